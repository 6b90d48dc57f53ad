"""Configurations, one file each; installed with the package as `ccu_jax.configs`.

A file sets `config = Config(...)`, and its docstring says what it is, the command, and
what to expect. `--config NAME` finds it here; a path ending in `.py` works as well.
"""
