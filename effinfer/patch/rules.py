"""Which class becomes which, and why: the whole of what effinfer patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from effinfer.errors import PatchConflictError
from effinfer.patch import mixers, norms
from effinfer.patch.last_tokens import LastTokensLM
from effinfer.patch.linear import LinearWithPacked, linear_reasons

Reasons = Callable[[nn.Module], list[str]]


def _no_reasons(module: nn.Module) -> list[str]:
    return []


@dataclass(frozen=True)
class Rule:
    """Modules whose class is exactly ``target`` get the methods of ``replacement``."""

    target: str
    replacement: type
    feature: str
    why: str
    reasons: Reasons = _no_reasons


_SCAN = "selective scan with initial state, padding mask and fused decode step"
_SSD = "chunked scan with initial state, padding mask and fused decode step"
_NORM = "one pass, float32 inside"
_GATED = "gate and norm in one pass"
_BLOCK = "norm, mixer and residual as one run of direct calls"
_LAST = "the last block's output only where its logits are asked for"
_LINEAR = "packed weight, read at memory speed"

_Row = tuple[str, str, type, str]
_MIXERS: tuple[_Row, ...] = (
    ("mamba", "MambaMixer", mixers.MambaMixer, _SCAN),
    ("falcon_mamba", "FalconMambaMixer", mixers.NormedMambaMixer, _SCAN),
    ("jamba", "JambaMambaMixer", mixers.NormedMambaMixer, _SCAN),
    ("mamba2", "Mamba2Mixer", mixers.SSDMixer, _SSD),
    ("bamba", "BambaMixer", mixers.SSDMixer, _SSD),
    ("granitemoehybrid", "GraniteMoeHybridMambaLayer", mixers.SSDMixer, _SSD),
    ("zamba2", "Zamba2MambaMixer", mixers.SSDMixer, _SSD),
    ("nemotron_h", "NemotronHMamba2Mixer", mixers.SSDMixer, _SSD),
    ("falcon_h1", "FalconH1Mixer", mixers.FalconH1Mixer, _SSD),
)
_NORMS: tuple[_Row, ...] = (
    ("mamba", "MambaRMSNorm", norms.RMSNorm, _NORM),
    ("falcon_mamba", "FalconMambaRMSNorm", norms.RMSNorm, _NORM),
    ("falcon_mamba", "FalconMambaWeightlessRMSNorm", norms.WeightlessRMSNorm, _NORM),
    ("jamba", "JambaRMSNorm", norms.RMSNorm, _NORM),
    ("mamba2", "Mamba2RMSNorm", norms.RMSNorm, _NORM),
    ("bamba", "BambaRMSNorm", norms.RMSNorm, _NORM),
    ("granitemoehybrid", "GraniteMoeHybridRMSNorm", norms.RMSNorm, _NORM),
    ("zamba2", "Zamba2RMSNorm", norms.RMSNorm, _NORM),
    ("nemotron_h", "NemotronHRMSNorm", norms.RMSNorm, _NORM),
    ("falcon_h1", "FalconH1RMSNorm", norms.RMSNorm, _NORM),
    ("mamba2", "MambaRMSNormGated", norms.GatedRMSNorm, _GATED),
    ("bamba", "BambaRMSNormGated", norms.GatedRMSNorm, _GATED),
    ("granitemoehybrid", "GraniteMoeHybridRMSNormGated", norms.GatedRMSNorm, _GATED),
    ("zamba2", "Zamba2RMSNormGated", norms.GatedRMSNorm, _GATED),
    ("nemotron_h", "NemotronHRMSNormGated", norms.GatedRMSNorm, _GATED),
    ("falcon_h1", "FalconH1RMSNormGated", norms.FalconH1GatedRMSNorm, _GATED),
)

_BLOCKS: tuple[_Row, ...] = (
    ("mamba", "MambaBlock", mixers.ResidualBlock, _BLOCK),
    ("falcon_mamba", "FalconMambaBlock", mixers.ResidualBlock, _BLOCK),
    ("mamba2", "Mamba2Block", mixers.ResidualBlock, _BLOCK),
)

_MODELS: tuple[_Row, ...] = (
    ("mamba", "MambaForCausalLM", LastTokensLM, _LAST),
    ("falcon_mamba", "FalconMambaForCausalLM", LastTokensLM, _LAST),
    ("mamba2", "Mamba2ForCausalLM", LastTokensLM, _LAST),
)

MODEL_TYPES = tuple(family for family, *_ in _MIXERS)


def class_name(cls: type) -> str:
    """How rules name a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _hub_class(family: str, name: str) -> str:
    return f"transformers.models.{family}.modeling_{family}.{name}"


def _table() -> Iterable[Rule]:
    yield Rule(class_name(nn.Linear), LinearWithPacked, "linear", _LINEAR, linear_reasons)
    for family, name, replacement, why in _MIXERS:
        yield Rule(_hub_class(family, name), replacement, "mixer", why, mixers.mixer_reasons)
    for family, name, replacement, why in _NORMS:
        yield Rule(_hub_class(family, name), replacement, "norm", why, norms.norm_reasons)
    for family, name, replacement, why in _BLOCKS:
        yield Rule(_hub_class(family, name), replacement, "block", why, mixers.block_reasons)
    for family, name, replacement, why in _MODELS:
        yield Rule(_hub_class(family, name), replacement, "block", why, mixers.model_reasons)


RULES: dict[str, Rule] = {rule.target: rule for rule in _table()}


def features() -> tuple[str, ...]:
    """The features that rules belong to."""
    return tuple(dict.fromkeys(rule.feature for rule in RULES.values()))


def register_patch(
    target: type[nn.Module] | str,
    replacement: type,
    *,
    feature: str,
    why: str,
    reasons: Reasons = _no_reasons,
    overwrite: bool = False,
) -> Rule:
    """Add a rule: modules whose class is ``target`` get the methods of ``replacement``.

    Args:
        target: the class, or its full dotted name (nothing is imported for a name).
        replacement: a class with a ``forward`` over the attributes ``target`` has. It becomes the
            first base of the swapped class; derive it from ``effinfer.patch.Patched`` to prepare
            something in ``on_patch``. What it keeps on the module is named ``_effinfer_...``.
        feature: what ``patch(features=)`` calls it: mixer, norm, linear or your own word.
        why: one line for the report.
        reasons: lists why a given module cannot be patched; empty where it can.
        overwrite: replace the rule this target already has.

    Raises:
        PatchConflictError: ``target`` has a rule and ``overwrite`` is False.
    """
    name = target if isinstance(target, str) else class_name(target)
    if name in RULES and not overwrite:
        raise PatchConflictError(
            f"register_patch: {name} already has a rule ({RULES[name].replacement.__name__}); "
            "pass overwrite=True to replace it"
        )
    rule = Rule(name, replacement, feature, why, reasons)
    RULES[name] = rule
    return rule
