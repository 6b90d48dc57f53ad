"""Audits of unlearning: measurements of models, stored as records, and verdicts."""
