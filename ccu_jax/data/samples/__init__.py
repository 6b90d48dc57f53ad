"""Small editions of the data sets with invented content, in the official formats."""
