"""Statistics of predictions, in NumPy and SciPy alone: no model, no JAX."""
