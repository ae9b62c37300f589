"""convert.py: conversions between HF checkpoints and DCPs, and the export of a live model."""
