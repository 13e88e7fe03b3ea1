"""Deliberate errors in the package, each with the tests that must notice it: ``python -m tests.mutants``."""
