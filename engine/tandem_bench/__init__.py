"""Benchmarks: kernels and steps against their floors, the engine in process, any endpoint."""
