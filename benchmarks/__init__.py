"""Benchmarks: `python -m benchmarks --scale smoke|full`. Ratios are measured in one run on one machine."""
