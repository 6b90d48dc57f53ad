"""Experiments of the command line: run a configuration, tune or ablate its methods."""
