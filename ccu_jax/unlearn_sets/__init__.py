"""Selection of the rows to retain, to unlearn and to hold out."""
