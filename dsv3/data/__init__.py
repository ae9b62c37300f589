"""From text to batches: corpus, tokenizer, token files, packing, loader."""
