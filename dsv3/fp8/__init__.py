"""FP8: block-wise quantization, matmuls in FP8 for training, and FP8 all-gather of weights."""
