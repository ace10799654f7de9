"""Comparisons of effinfer with other implementations; docs/benchmarks.md says how to run them."""
