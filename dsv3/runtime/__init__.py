"""Processes, signals, directories and errors around the work."""
