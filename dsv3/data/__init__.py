"""Data: corpora, tokenizers, token files, packing into rows, and the data loader."""
