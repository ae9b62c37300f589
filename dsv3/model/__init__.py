"""DeepSeek-V3 in plain PyTorch: MLA attention, fine-grained MoE, multi-token prediction."""
