"""Execution on several devices and hosts."""
