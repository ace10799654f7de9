"""Efficient-architecture PyTorch models, fast on the machine you have.

Importing this changes nothing in torch or transformers.
"""

from typing import TYPE_CHECKING, Any

from effinfer import fold, nn, ops
from effinfer._native import backend_info, set_backend, set_num_threads, use_backend, use_reference
from effinfer.errors import (
    BackendUnavailableError,
    EffinferError,
    PatchConflictError,
    UnsupportedModelError,
    UnsupportedOpError,
    VerificationError,
)
from effinfer.loading import register_with_transformers
from effinfer.patch import PatchReport, patch, patched, register_patch, supported, unpatch
from effinfer.quant import (
    QuantConfig,
    QuantReport,
    load_quantized,
    plan_bits,
    quantize_,
)
from effinfer.recursive import to_recursive

if TYPE_CHECKING:
    from effinfer.engine import Engine, Output, SamplingParams, generate

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "EffinferError",
    "Engine",
    "Output",
    "PatchConflictError",
    "PatchReport",
    "QuantConfig",
    "QuantReport",
    "SamplingParams",
    "UnsupportedModelError",
    "UnsupportedOpError",
    "VerificationError",
    "backend_info",
    "fold",
    "generate",
    "load_quantized",
    "nn",
    "ops",
    "patch",
    "patched",
    "plan_bits",
    "quantize_",
    "register_patch",
    "register_with_transformers",
    "set_backend",
    "set_num_threads",
    "supported",
    "to_recursive",
    "unpatch",
    "use_backend",
    "use_reference",
]

_OF_THE_ENGINE = ("Engine", "Output", "SamplingParams", "generate")


def __getattr__(name: str) -> Any:
    """The engine's names, imported when they are first asked for."""
    if name in _OF_THE_ENGINE:
        from effinfer import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'effinfer' has no attribute {name!r}")
