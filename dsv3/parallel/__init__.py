"""Parallel wrappers around the model (FSDP, TP, CP, EP, PP, checkpointing, compile) and their wrap order."""
