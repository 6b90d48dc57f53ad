"""What a command does: run a configuration, tune it, or ablate its methods."""
