"""Atomic writes, checksummed records, and columns of arrays on disk."""
