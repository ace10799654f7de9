"""Efficient-architecture PyTorch models, fast on the machine you have.

Importing this changes nothing in torch or transformers.
"""

from effinfer import ops
from effinfer._native import backend_info, set_backend, set_num_threads, use_backend, use_reference

__version__ = "0.1.0"

__all__ = [
    "backend_info",
    "ops",
    "set_backend",
    "set_num_threads",
    "use_backend",
    "use_reference",
]
