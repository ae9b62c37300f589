"""Metrics: rows of metrics.jsonl, the console, loggers, plots, and the load balance of experts."""
