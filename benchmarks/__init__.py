"""Benchmarks of moe_kernels; start with ``python benchmarks/run.py --list``."""
