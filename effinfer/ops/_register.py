"""How an op becomes ``torch.ops.effinfer.<op>`` and a fast Python function at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

import torch
from torch import is_grad_enabled
from torch.compiler import is_compiling  # bare names: an attribute less in every call

from effinfer import _native

P = ParamSpec("P")
R = TypeVar("R")

_library: Any = cast(Any, torch.library).Library("effinfer", "FRAGMENT")
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_FLOAT32 = torch.float32


class Op:
    """One registered op: its native run, its fake, and its plain-torch reference.

    ``schema`` is the op's torch signature without its name; ``run`` and ``reference`` take exactly
    these arguments by position and return what the schema says. ``fake`` takes those of them that
    it names, and returns empty results of the right shapes.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        reference: Callable[..., Any],
    ) -> None:
        self.name = name
        self._run = run
        self._reference = reference
        # `Library.impl` costs 3-4 us a call where `custom_op` costs 10-45.
        _library.define(name + schema)
        _library.impl(name, self._dispatched, "CPU")
        _library.impl(name, self._dispatched, "CUDA")
        self._torch_op = getattr(torch.ops.effinfer, name).default
        arguments = [argument.name for argument in self._torch_op._schema.arguments]
        whole_fake = _whole_fake(name, fake, arguments)
        torch.library.register_fake(f"effinfer::{name}", whole_fake, lib=_library)

    def _dispatched(self, *args: Any) -> Any:
        return self._reference(*args) if _native.wants_reference() else self._run(*args)

    def __call__(self, *args: Any) -> Any:
        """Run eagerly without the dispatcher where that is the same thing, else through it."""
        if is_compiling():
            return self._torch_op(*args)
        try:
            if type(args[0]) not in _PLAIN:
                if args[0] is None:  # which the dispatcher takes for a tensor
                    raise TypeError("the first argument must be a tensor, got None")
                return self._torch_op(*args)
            return self._reference(*args) if _native.wants_reference() else self._run(*args)
        except (AttributeError, IndexError, RuntimeError, TypeError) as error:
            named = self._named(error)
            if named is error:
                raise
            raise named from error

    def _named(self, error: Exception) -> Exception:
        """``error`` itself if it names the op, else one that does: Python or torch met an argument
        of the wrong kind before the native checks could."""
        subclass = isinstance(error, RuntimeError) and type(error) is not RuntimeError
        if subclass or self.name.removesuffix("_residual") in str(error):
            return error
        kind = RuntimeError if isinstance(error, RuntimeError) else TypeError
        return kind(f"{self.name}: an argument is not as it must be: {error}")


def _whole_fake(op: str, fake: Callable[..., R], arguments: list[str]) -> Callable[..., R]:
    """``fake``, which takes some of ``arguments``, as one that takes them all and sees that they are
    on one device: torch calls it for the real results too where a single tensor is on ``meta``."""
    wanted = list(inspect.signature(fake).parameters)

    def call(*args: Any, **kwargs: Any) -> R:
        given = dict(zip(arguments, args, strict=False)) | kwargs
        devices = {str(value.device) for value in given.values() if torch.is_tensor(value)}
        if len(devices) > 1:
            raise ValueError(
                f"{op}: tensors must be on one device, got {', '.join(sorted(devices))}"
            )
        return fake(**{name: given[name] for name in wanted})

    return call


class OpFunction(Generic[P, R]):
    """Type of a public op function: callable, with ``isa()`` and ``reference`` beside it."""

    isa: Callable[[], str]
    reference: Callable[..., Any]
    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...  # type: ignore[empty-body]


def public(op: Op) -> Callable[[Callable[P, R]], OpFunction[P, R]]:
    """Give a public op function its ``isa()`` and ``reference``; the function stays a function."""

    def mark(function: Callable[P, R]) -> OpFunction[P, R]:
        marked = cast(Any, function)
        marked.isa = lambda: _native.module("_C").kernels()[op.name]
        marked.reference = op._reference
        return cast(OpFunction[P, R], marked)

    return mark


def inference_only(op: str, *inputs: torch.Tensor | None) -> None:
    """Refuse inputs that want a gradient: the kernels have no backward pass."""
    if not is_grad_enabled():
        return
    for tensor in inputs:
        if tensor is not None and tensor.requires_grad and type(tensor) is not torch.nn.Parameter:
            raise RuntimeError(
                f"{op}: an input of shape {tuple(tensor.shape)} requires grad, but this op has no "
                f"backward pass; run it under torch.inference_mode(), or use "
                f"effinfer.ops.{op}.reference for training"
            )


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself when its last dimension is dense and its rows evenly spaced, else a copy."""
    if x.is_contiguous() or _evenly_spaced_rows(x):
        return x
    return x.contiguous()


@overload
def dense_float32(x: torch.Tensor) -> torch.Tensor: ...
@overload
def dense_float32(x: torch.Tensor | None) -> torch.Tensor | None: ...


def dense_float32(x: torch.Tensor | None) -> torch.Tensor | None:
    """``x`` as contiguous float32, itself where it already is: for parameters and states."""
    if x is None or (x.dtype is _FLOAT32 and x.is_contiguous()):
        return x
    if x.is_complex():
        raise TypeError(f"a parameter or state must be real, got {x.dtype}")
    return x.float().contiguous()


def _evenly_spaced_rows(x: torch.Tensor) -> bool:
    shape, stride = x.shape, x.stride()
    return stride[-1] == 1 and all(
        stride[i] == shape[i + 1] * stride[i + 1] for i in range(x.dim() - 2)
    )
