"""The ops: each a fast function with ``.reference`` (plain torch) and ``.isa()`` beside it."""

from effinfer.ops.rms_norm import rms_norm

__all__ = ["rms_norm"]
