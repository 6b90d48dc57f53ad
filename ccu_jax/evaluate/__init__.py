"""Forward passes, stored predictions and features of trained models."""
