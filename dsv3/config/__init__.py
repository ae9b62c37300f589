"""Config schemas: one file per group of conf/, the strict check of what Hydra composed, and overrides."""
