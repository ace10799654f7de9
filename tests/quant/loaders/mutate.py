"""Damage that a hostile file may do to a loader's arguments."""

import torch
from hypothesis import strategies as st

DTYPES = (torch.uint8, torch.int8, torch.int32, torch.float16, torch.float32)
NUMBERS = st.sampled_from((-(2**63), -1, 0, 1, 3, 5, 16, 24, 48, 1000, 2**31, 2**62))


@st.composite
def mutations(draw, tensors, numbers=(), most=3):
    """One to ``most`` steps, each ``(name, function of the old value)``."""
    steps = []
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(("flip", "cut", "repeat", "dtype", "flatten", "number")))
        if kind == "number" and numbers:
            number = draw(NUMBERS)
            steps.append((draw(st.sampled_from(numbers)), lambda _, n=number: n))
            continue
        at, by = draw(st.integers(0, 2**20)), draw(st.integers(1, 255))
        dtype = draw(st.sampled_from(DTYPES))
        steps.append(
            (
                draw(st.sampled_from(tensors)),
                {
                    "flip": lambda x, at=at, by=by: flip(x, at, by),
                    "number": lambda x, at=at, by=by: flip(x, at, by),
                    "cut": lambda x, at=at: cut(x, at),
                    "repeat": lambda x: torch.cat([x, x]) if x.dim() else x,
                    "dtype": lambda x, dtype=dtype: x.to(dtype),
                    "flatten": lambda x: x.reshape(-1),
                }[kind],
            )
        )
    return steps


def apply(steps, arguments):
    """The arguments with every step taken."""
    arguments = dict(arguments)
    for name, step in steps:
        arguments[name] = step(arguments[name])
    return arguments


def flip(x, at, by):
    """One byte changed."""
    x = x.contiguous().clone()
    flat = x.reshape(-1).view(torch.uint8)
    if flat.numel():
        flat[at % flat.numel()] ^= by
    return x


def cut(x, at):
    """Rows or columns dropped off the end, all of them too."""
    if not x.dim():
        return x
    dim = at % x.dim()
    return x.narrow(dim, 0, (at // 2) % (x.shape[dim] + 1))
