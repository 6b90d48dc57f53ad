"""Which rows are retained, unlearned and held out."""
