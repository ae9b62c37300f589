"""Checkpoints of a run: saving, restoring, verifying and removing them, and loading weights from any kind."""
