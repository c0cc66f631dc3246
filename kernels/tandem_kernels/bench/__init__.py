"""Benchmarks of the kernels: each checks before it times, and prints value, floor and percent."""
