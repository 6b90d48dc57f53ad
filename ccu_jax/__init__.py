"""Cross-modal contrastive unlearning of image+text classifiers in JAX."""

__version__ = "0.1.0"
