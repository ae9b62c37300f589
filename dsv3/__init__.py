"""DeepSeek-V3 family training: see docs/architecture.md for the map of the rooms."""
