"""unlearn_sets."""
