"""Changing the class of one module instance, and changing it back."""

from __future__ import annotations

from typing import Any, ClassVar, SupportsIndex

from torch import nn

# Everything a patched module keeps for itself starts so; unpatching removes exactly that.
PREFIX = "_effinfer_"


class Patched:
    """Marks a swapped class; ``_effinfer_base`` is the class the module had."""

    _effinfer_base: ClassVar[type[nn.Module]]
    _effinfer_replacement: ClassVar[type]
    # Whole models keep their class's name: it is saved in their configuration.
    stock_name: ClassVar[bool] = False

    def on_patch(self) -> None:
        """Prepare what the new forward needs; called once, right after the swap."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # The swapped class is made at run time, so pickle cannot find it by name.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (self._effinfer_replacement, self._effinfer_base), *reduced[2:])


_classes: dict[tuple[type, type], type] = {}


def swapped_class(replacement: type, base: type) -> type:
    """A subclass of ``base`` whose methods come from ``replacement`` first; always the same one."""
    found = _classes.get((replacement, base))
    if found is None:
        found = _classes[replacement, base] = _make_class(replacement, base)
    return found


def _make_class(replacement: type, base: type) -> type:
    bases = (
        (replacement, base) if issubclass(replacement, Patched) else (replacement, Patched, base)
    )
    keeps_name = getattr(replacement, "stock_name", False)
    return type(
        base.__name__ if keeps_name else f"Eff{base.__name__}",
        bases,
        {
            "__module__": replacement.__module__,
            "_effinfer_base": base,
            "_effinfer_replacement": replacement,
        },
    )


def _new(replacement: type, base: type[nn.Module]) -> Any:
    cls: Any = swapped_class(replacement, base)
    return cls.__new__(cls)


def swap(module: nn.Module, replacement: type) -> None:
    """Give ``module`` the methods of ``replacement``; its parameters, buffers and hooks stay."""
    module.__class__ = swapped_class(replacement, type(module))
    assert isinstance(module, Patched)
    module.on_patch()


def restore(module: nn.Module) -> None:
    """Undo ``swap``: the class it had, and nothing of ours left on it."""
    assert isinstance(module, Patched)
    ours = [name for name in (*module.__dict__, *module._buffers) if name.startswith(PREFIX)]
    module.__class__ = module._effinfer_base  # type: ignore[assignment]
    for name in ours:
        delattr(module, name)
