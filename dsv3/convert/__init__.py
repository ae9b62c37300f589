"""Moves weights between HuggingFace's files and PyTorch's checkpoints, a slice of rows at a time."""
