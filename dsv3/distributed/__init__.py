"""The process group of a run: rank context, device, stop signals, watchdog, and torch's private APIs."""
