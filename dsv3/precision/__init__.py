"""Number formats of the compute and of the stored state."""
