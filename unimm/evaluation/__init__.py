"""Measure models: one folder a benchmark (rules without a model, run, command) over `metrics` and `runs`."""
