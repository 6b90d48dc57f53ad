"""From the source of a data set to memory-mapped columns and TFDS records."""
