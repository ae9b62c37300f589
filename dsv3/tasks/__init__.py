"""The tasks: one file per choice of the `task` group, each with a class whose `run` does it."""
