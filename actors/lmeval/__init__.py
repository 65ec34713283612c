"""Benchmarks of lm-eval beside a model: its requests answered by an engine, its programs run in a sandbox."""
