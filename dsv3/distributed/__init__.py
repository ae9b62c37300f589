"""The process group of a run: rank context, stop signals, watchdog, and torch's private APIs."""
