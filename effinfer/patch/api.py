"""``patch``, ``unpatch``, ``patched`` and ``supported``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effinfer.errors import (
    BackendUnavailableError,
    PatchConflictError,
    UnsupportedModelError,
)
from effinfer.nn.size import model_bytes
from effinfer.patch.linear import lay_end_to_end
from effinfer.patch.plan import Choice, Filter, check_model, make_plan
from effinfer.patch.quantize import (
    choose_low_bit,
    low_bit_bytes,
    quantized_copies,
    swap_low_bit,
)
from effinfer.patch.report import PatchReport
from effinfer.patch.swap import Patched, restore, swap
from effinfer.patch.verify import Probe
from effinfer.quant.config import QuantConfig


def patch(
    model: nn.Module,
    *,
    features: str | Iterable[str] = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    filter_fn: Filter | None = None,
    backend: str | None = None,
    quantize: QuantConfig | None = None,
    calibration: Any = None,
    strict: bool = False,
    verify: bool = False,
    dry_run: bool = False,
) -> PatchReport:
    """Make ``model`` run on effinfer's kernels, in place; ``unpatch`` undoes it exactly.

    Modules whose class a rule knows change their class for a subclass with another forward.
    Parameters, state_dict keys, hooks, saving and copying stay as they are; other models and
    transformers itself are not touched.

    Args:
        model: in eval mode, weights loaded.
        features: "auto" for all, or some of "mixer", "norm", "linear", "block" (and registered ones).
        include: patch only modules whose name matches one of these glob patterns.
        exclude: leave modules whose name matches one of these alone.
        filter_fn: called with (name, module); False leaves the module alone.
        backend: "cpu" or "cuda" to insist that the model runs there on native kernels; by default
            the device of the tensors decides at each call.
        quantize: run linears on low-bit copies of their weights. The float parameters stay, so that
            ``unpatch`` is exact: the model gets faster, not smaller. ``effinfer.quantize_``, then
            ``patch``, gives up the float weights.
        calibration: texts or batches, as for ``effinfer.quantize_``.
        strict: raise unless every module that has a rule was patched.
        verify: run a few tokens before and after, and restore the model if the results differ.
        dry_run: report what would happen and change nothing.

    Raises:
        PatchConflictError: the model is patched already.
        UnsupportedModelError: training mode, weights on meta, or ``strict`` is not satisfied.
        ValueError, TypeError: bad arguments, or what ``effinfer.quantize_`` raises.
        VerificationError: ``verify`` found a difference; the model was restored.
        BackendUnavailableError: ``backend`` is not here, or not where the model is.
    """
    if quantize is not None and not isinstance(quantize, QuantConfig):
        raise TypeError(f"patch: quantize must be a QuantConfig or None, got {quantize!r}")
    if quantize is not None and verify:
        raise ValueError("patch: verify holds outputs to the float model's; not with quantize")
    choice = Choice.of(features, include, exclude, filter_fn)
    check_model(model, dry_run=dry_run)
    done = [name for name, module in model.named_modules() if isinstance(module, Patched)]
    if done:
        raise PatchConflictError(
            f"patch: {len(done)} modules are patched already ({done[0]}, ...); "
            "call effinfer.unpatch(model) first"
        )
    if backend is not None:
        _check_backend(backend, model)
    plan = make_plan(model, choice)
    if quantize is not None:
        quantize = choose_low_bit(model, quantize, choice, plan)
    if strict and (complaints := plan.complaints()):
        raise UnsupportedModelError(
            f"patch: not all of {type(model).__name__} could be patched:\n  "
            + "\n  ".join(complaints)
        )
    size = model_bytes(model)
    report = PatchReport(
        type(model).__name__,
        plan.replaced,
        plan.skipped,
        plan.fallbacks,
        bytes_before=size,
        bytes_after=size,
        dry_run=dry_run,
    )
    if dry_run:
        return report
    copies = {} if quantize is None else quantized_copies(model, quantize, calibration)
    probe = Probe.record(model) if verify else None
    try:
        if quantize is not None:
            swap_low_bit(copies, quantize)
        for module, rule in plan.swaps:
            swap(module, rule.replacement)
        lay_end_to_end(model)
        if probe is not None:
            report.verified = probe.compare(model)
    except BaseException:
        unpatch(model)
        raise
    report.bytes_after = model_bytes(model) + low_bit_bytes(copies.values())
    return report


def unpatch(model: nn.Module) -> int:
    """Restore every patched module of ``model``; returns how many there were."""
    modules = [module for module in model.modules() if isinstance(module, Patched)]
    for module in modules:
        restore(module)
    return len(modules)


@contextlib.contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[PatchReport]:
    """``patch(model, **options)`` for a ``with`` block."""
    report = patch(model, **options)
    try:
        yield report
    finally:
        unpatch(model)


@dataclass(frozen=True)
class Support:
    """Whether a model would be patched; true or false by itself, with the report behind it."""

    ok: bool
    reasons: tuple[str, ...]
    report: PatchReport

    def __bool__(self) -> bool:
        return self.ok


def supported(model_or_config: Any) -> Support:
    """Whether effinfer speeds this model up: it has an SSM mixer and all its mixers have rules.

    For a configuration, the model is built on the meta device: no weights are made.
    """
    if isinstance(model_or_config, nn.Module):
        model = model_or_config
    else:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_or_config)
    plan = make_plan(model, Choice.of("auto", None, None, None))
    name = type(model).__name__
    report = PatchReport(name, plan.replaced, plan.skipped, plan.fallbacks, dry_run=True)
    reasons = [f"{s.name} ({s.module}): {'; '.join(s.reasons)}" for s in plan.skipped]
    has_mixer = any(r.feature == "mixer" for r in plan.replaced)
    stuck = any(s.feature == "mixer" for s in plan.skipped)
    if not has_mixer and not stuck:
        reasons.insert(0, f"no mixer of {name} has a rule")
    return Support(has_mixer and not stuck, tuple(reasons), report)


def _check_backend(backend: str, model: nn.Module) -> None:
    if backend not in ("cpu", "cuda"):
        raise ValueError(f"patch: backend must be None, 'cpu' or 'cuda', got {backend!r}")
    from effinfer import _native

    _native.module("_C" if backend == "cpu" else "_C_cuda")
    elsewhere = {p.device.type for p in model.parameters()} - {backend}
    if elsewhere:
        raise BackendUnavailableError(
            f"patch: backend={backend!r}, but parameters are on {', '.join(sorted(elsewhere))}"
        )
