"""Saving and loading: what stands in a checkpoint directory and who may be trusted."""
