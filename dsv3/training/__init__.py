"""The optimizer step and everything around it."""
