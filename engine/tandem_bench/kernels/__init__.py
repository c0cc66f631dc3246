"""Benchmarks of the kernels: each checks before it times and yields time, floor and percent."""
