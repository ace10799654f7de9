"""Which request sat at which depth at each launch, for a terminal; ``depth_png`` draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text

from effinfer.engine.wrappers import TracedRow

# Bright where a token begins, dark where it is deep; told apart without colour vision too.
PALETTE = ("#fde725", "#5ec962", "#21918c", "#3b528b")
LABEL_WIDTH = 8
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Cell:
    """What a request did in a launch.

    Attributes:
        request: its number, from 0.
        loops: that its rows ran, from 0; that of its newest position first, no loop twice.
        prompt: its newest position in the launch belongs to the prompt.
        begins: it is the request's first launch.
    """

    request: int
    loops: tuple[int, ...]
    prompt: bool
    begins: bool


Grid = list[list[Cell | None]]  # a line per slot, a column per launch


def grid(
    launches: Sequence[Sequence[TracedRow]], prompt_tokens: Mapping[int, int], slots: int
) -> Grid:
    """Arrange launches by slot.

    Args:
        launches: rows of each, as ``TracedRunner`` notes them.
        prompt_tokens: length of each request's prompt, by request id; they are numbered in this
            order.
        slots: lines of the picture.
    """
    number = {request: i for i, request in enumerate(prompt_tokens)}
    lines: Grid = [[None] * len(launches) for _ in range(slots)]
    seen: set[int] = set()
    for at, launch in enumerate(launches):
        by_slot: dict[int, list[TracedRow]] = {}
        for row in launch:
            by_slot.setdefault(row.slot, []).append(row)
        for slot, rows in by_slot.items():
            rows.sort(key=lambda row: -row.position)
            newest = rows[0]
            lines[slot][at] = Cell(
                request=number[newest.request],
                loops=tuple(dict.fromkeys(row.loop for row in rows)),
                prompt=newest.position < prompt_tokens[newest.request],
                begins=newest.request not in seen,
            )
            seen.add(newest.request)
    return lines


def colour(loop: int, loops: int) -> str:
    """The colour of a loop of ``loops``, as #rrggbb."""
    return PALETTE[round(loop * (len(PALETTE) - 1) / max(loops - 1, 1))]


def letter(request: int) -> str:
    """What a request is called in a picture."""
    return _LETTERS[request % len(_LETTERS)]


def is_dark(background: str) -> bool:
    """Whether white is easier to read on it than black."""
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.6 * green + 0.1 * blue < 128


def render(lines: Grid, loops: int, width: int = 80) -> list[Text]:
    """A line of text per slot, with as many launches as fit ``width`` columns.

    A digit is the loop of the request's newest position. On its colour: a token that is generated;
    in its colour: the prompt. Underlined: earlier positions run deeper loops in the same launch. A
    letter stands for the first digit of a request, which is always 1.
    """
    rendered = []
    for slot, cells in enumerate(lines):
        line = Text(f"slot {slot + 1}".ljust(LABEL_WIDTH))
        for cell in cells[: width - LABEL_WIDTH]:
            if cell is None:
                line.append(" ")
            else:
                mark = letter(cell.request) if cell.begins else str(cell.loops[0] + 1)
                line.append(mark, _style(cell, loops))
        rendered.append(line)
    return rendered


def legend(loops: int) -> Text:
    """What the colours of ``render`` mean."""
    line = Text("loop ")
    for loop in range(loops):
        cell = Cell(0, (loop,), prompt=False, begins=False)
        line.append(f" {loop + 1} ", _style(cell, loops))
    line.append("  ")
    line.append("1", _style(Cell(0, (0,), prompt=True, begins=False), loops))
    line.append(" prompt  ")
    line.append("1", _style(Cell(0, (0, 1), prompt=False, begins=False), loops))
    return line.append(" and earlier tokens deeper  A: request A begins")


def _style(cell: Cell, loops: int) -> Style:
    own = colour(cell.loops[0], loops)
    more = len(cell.loops) > 1
    if cell.prompt:
        return Style(color=own, underline=more, bold=cell.begins)
    text = "#ffffff" if is_dark(own) else "#000000"
    return Style(color=text, bgcolor=own, underline=more, bold=cell.begins)
