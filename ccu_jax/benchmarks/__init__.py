"""Benchmarks of speed and memory: `python -m ccu_jax.benchmarks`."""
