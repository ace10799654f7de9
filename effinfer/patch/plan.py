"""What patching a model would do: nothing here changes anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from effinfer.errors import UnsupportedModelError
from effinfer.nn.lowbit import LowBitLinear
from effinfer.patch.report import Fallback, Replaced, Skipped
from effinfer.patch.rules import RULES, Rule, class_name, features

Filter = Callable[[str, nn.Module], bool]

_STOCK_REASONS = {
    "Attention": "attention stays stock",
    "Experts": "experts stay stock",
    "Router": "routing stays stock",
    "Gating": "routing stays stock",
}
# Looked up or read by a patched mixer, not computed on their own.
_PASSIVE = (nn.Embedding, nn.Conv1d)


@dataclass
class Plan:
    """The modules to swap with their rules, and what the report will say."""

    swaps: list[tuple[nn.Module, Rule]] = field(default_factory=list)
    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)

    def complaints(self) -> list[str]:
        """Why ``strict`` would refuse."""
        if not self.swaps and not self.skipped:
            return ["no module has a rule"]
        return [f"{s.name} ({s.module}): {'; '.join(s.reasons)}" for s in self.skipped]


@dataclass(frozen=True)
class Choice:
    """Which modules the caller wants patched."""

    features: frozenset[str]
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    filter_fn: Filter | None

    @classmethod
    def of(
        cls,
        wanted: str | Iterable[str],
        include: str | Sequence[str] | None,
        exclude: str | Sequence[str] | None,
        filter_fn: Filter | None,
    ) -> Choice:
        """Check and normalise the arguments of ``patch``."""
        known = features()
        if wanted == "auto":
            names = frozenset(known)
        else:
            names = frozenset([wanted] if isinstance(wanted, str) else wanted)
            if unknown := sorted(names - set(known)):
                raise ValueError(
                    f"patch: features must be 'auto' or among {', '.join(known)}, "
                    f"got {', '.join(unknown)}"
                )
        return cls(names, None if include is None else _globs(include), _globs(exclude), filter_fn)

    def refusals(self, name: str, module: nn.Module, rule: Rule) -> list[str]:
        """Why the caller's choice leaves this module out."""
        reasons = []
        if rule.feature not in self.features:
            reasons.append(f"feature {rule.feature!r} not asked for")
        if self.include is not None and not _matches(name, self.include):
            reasons.append("not in include")
        if _matches(name, self.exclude):
            reasons.append("in exclude")
        if self.filter_fn is not None and not self.filter_fn(name, module):
            reasons.append("refused by filter_fn")
        return reasons


def _globs(patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    if patterns is None:
        return ()
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _obstacles(module: nn.Module, rule: Rule) -> list[str]:
    """Why the module as it stands cannot be swapped."""
    reasons = []
    if "forward" in module.__dict__:
        reasons.append(
            "its forward was replaced on the instance (accelerate hooks, kernelize, Liger): "
            "remove that first"
        )
    return [*reasons, *rule.reasons(module)]


def make_plan(model: nn.Module, choice: Choice) -> Plan:
    """Match every module of ``model`` against the rules."""
    plan = Plan()
    for name, module in model.named_modules():
        label = type(module).__name__
        rule = RULES.get(class_name(type(module)))
        if rule is None:
            if reason := _stock_reason(module):
                plan.fallbacks.append(Fallback(name, label, reason))
            continue
        reasons = [*choice.refusals(name, module, rule), *_obstacles(module, rule)]
        if reasons:
            plan.skipped.append(Skipped(name, label, rule.feature, tuple(reasons)))
            continue
        plan.swaps.append((module, rule))
        plan.replaced.append(
            Replaced(name, label, rule.replacement.__name__, rule.feature, rule.why)
        )
    return plan


def _stock_reason(module: nn.Module) -> str | None:
    """What to report about a module without a rule: None if it only holds others."""
    label = type(module).__name__
    if isinstance(module, LowBitLinear) and module.order is not None:
        return "permutes its input: a mixer around it goes through its modules"
    for part, reason in _STOCK_REASONS.items():
        if label.endswith(part):
            return reason
    if isinstance(module, _PASSIVE) or not any(True for _ in module.parameters(recurse=False)):
        return None
    return "no rule for this class"


def check_model(model: nn.Module, *, dry_run: bool = False) -> None:
    """Refuse what cannot be patched at all; a dry run needs no weights."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    on_meta = [name for name, p in model.named_parameters() if p.is_meta]
    if on_meta and not dry_run:
        raise UnsupportedModelError(
            f"patch: {len(on_meta)} parameters are on the meta device ({on_meta[0]}, ...): "
            "load the weights before patching"
        )
    if model.training:
        raise UnsupportedModelError(
            "patch: the model is in training mode and effinfer is for inference: call model.eval(), "
            "and run it under torch.inference_mode()"
        )
