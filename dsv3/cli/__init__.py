"""The command line: arguments, help, error messages and exit codes of train.py and convert.py."""
