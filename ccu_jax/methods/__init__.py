"""The original, the retrained references, and the unlearning methods."""

from ccu_jax.methods.problem import Problem
from ccu_jax.methods.registry import CONTROL, METHODS, OURS, REFERENCE, REFERENCES

__all__ = ["CONTROL", "METHODS", "OURS", "REFERENCE", "REFERENCES", "Problem"]
