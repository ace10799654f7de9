"""Patching of Hugging Face models: a rule table, class swaps, and a report."""

from effinfer.patch.api import Support, patch, patched, supported, unpatch
from effinfer.patch.report import Fallback, PatchReport, Replaced, Skipped
from effinfer.patch.rules import MODEL_TYPES, Rule, register_patch
from effinfer.patch.swap import Patched

__all__ = [
    "MODEL_TYPES",
    "Fallback",
    "PatchReport",
    "Patched",
    "Replaced",
    "Rule",
    "Skipped",
    "Support",
    "patch",
    "patched",
    "register_patch",
    "supported",
    "unpatch",
]
