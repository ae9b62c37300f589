"""The ground that all tests stand on: one way to run a command, one tiny model, one pool of workers.

Fixtures around these modules live in tests/conftest.py. Benchmarks import from here too.
"""
