"""Data: sources, mixtures, packing into rows, streams of the hub, batches, and the data loader."""
