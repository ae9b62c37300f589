"""Documents: text files, JSON lines, Parquet and datasets, read in pieces, and what is skipped of them."""
