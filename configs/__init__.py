"""Configurations, one file each; installed with the package as `ccu_jax.configs`.

A file sets `config = Config(...)`. Its docstring describes the data, the command, and
the expected results. `--config NAME` finds it here; a path ending in `.py` works as
well.
"""
