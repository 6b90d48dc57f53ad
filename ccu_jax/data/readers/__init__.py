"""Readers of the supported data sets."""
