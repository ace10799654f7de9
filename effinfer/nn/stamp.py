"""Notices when weights change, so that nothing computed from them goes silently stale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")
Stamp = list[int]
_version = attrgetter("_version")  # by map(), half the time of an attribute in a loop


def stamp(*weights: torch.Tensor | None) -> Stamp:
    """What identifies the present values of ``weights``: address and version counter.

    Every in-place write through autograd-visible tensors (``load_state_dict``, ``copy_``, ``add_``)
    raises the version; ``.to()`` and assignment change the address. Writes through ``.data`` raise
    no counter and cannot be seen.
    """
    present = [w for w in weights if w is not None]
    addresses = map(torch.Tensor.data_ptr, present)
    try:
        return [*addresses, *map(_version, present)]
    except RuntimeError:  # tensors made in inference mode have no counter
        versions = [0 if w.is_inference() else w._version for w in present]
        return [w.data_ptr() for w in present] + versions


def derived(
    module: nn.Module,
    weights: Sequence[torch.Tensor | None],
    build: Callable[[], T],
    name: str = "_effinfer_derived",
) -> T:
    """``build()``, kept on ``module`` as ``name`` until one of ``weights`` changes.

    Under ``torch.compile`` it is rebuilt in the graph: versions cannot be read there, and the
    compiler fuses what is this small.
    """
    if torch.compiler.is_compiling():
        return build()
    now = stamp(*weights)
    kept: tuple[Stamp, T] | None = module.__dict__.get(name)
    if kept is None or kept[0] != now:
        # Outside inference mode, so that the tensors may be used in any mode later.
        with torch.inference_mode(False), torch.no_grad():
            kept = (now, build())
        module.__dict__[name] = kept
    return kept[1]
