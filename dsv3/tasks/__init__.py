"""What a command can do: one file a choice of conf/task."""
