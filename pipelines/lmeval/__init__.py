"""Benchmarks of lm-eval: which there are, and local files in place of their data sets."""
