"""Recursive language models: a tied block run R times, with low-rank additions in each loop.

``effinfer.recursive.config`` and ``effinfer.recursive.modeling`` hold the model's classes, which
subclass transformers' and so are imported only when needed.
"""

from effinfer.recursive.convert import to_recursive
from effinfer.recursive.register import register_with_transformers

__all__ = ["register_with_transformers", "to_recursive"]
