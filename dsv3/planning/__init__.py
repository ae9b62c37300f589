"""Arithmetic on integers before any process, tensor or GPU is touched."""
