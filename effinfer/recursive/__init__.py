"""Recursive language models: a tied block run R times, with low-rank additions in each loop."""
