"""Programs of methods, the training loop and checkpoints."""
