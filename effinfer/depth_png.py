"""The picture of depths as a PNG. Needs Pillow: ``pip install effinfer[demo]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effinfer.depth_picture import Cell, Grid, colour, is_dark, letter
from effinfer.errors import EffinferError

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

CELL_WIDTH, CELL_HEIGHT, GAP = 14, 26, 5  # of a launch in a slot; between slots
LEFT, TOP, RIGHT = 92, 78, 24  # margins of the first panel's cells
PANEL_HEAD, FOOT = 44, 104  # over a panel's cells; under the last panel's
TEXT, TITLE, SMALL = 22, 26, 17  # sizes of letters
INK, PALE = "#222222", "#777777"
TICK_EVERY = 10


@dataclass(frozen=True)
class Panel:
    """A way to run the workload: its name, what to say of it, and its cells."""

    name: str
    note: str
    lines: Grid


def require_pillow() -> Any:
    """The package PIL.

    Raises:
        EffinferError: it is not installed.
    """
    try:
        import PIL
    except ImportError:
        raise EffinferError("a picture needs Pillow: pip install 'effinfer[demo]'") from None
    return PIL


def cell_box(panels: Sequence[Panel], panel: int, slot: int, launch: int) -> tuple[int, ...]:
    """Pixels of a cell: left, top, and the last ones right and below."""
    top = TOP + sum(_height(each) for each in panels[:panel]) + PANEL_HEAD
    top += slot * (CELL_HEIGHT + GAP)
    left = LEFT + launch * CELL_WIDTH
    return left, top, left + CELL_WIDTH - 2, top + CELL_HEIGHT - 1


def draw_png(path: Path, title: str, panels: Sequence[Panel], loops: int, launches: int) -> None:
    """Write the first ``launches`` launches of every panel to ``path``, one below the other.

    A cell is divided by the loops that its request's rows ran, the newest position's on top;
    prompts are pale. A letter names a request where it begins.

    Raises:
        EffinferError: Pillow is not installed.
        OSError: the file can't be written.
    """
    require_pillow()
    from PIL import Image, ImageDraw

    width = LEFT + launches * CELL_WIDTH + RIGHT
    height = TOP + sum(_height(panel) for panel in panels) + FOOT
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 16), title, INK, _font(TITLE))
    for at, panel in enumerate(panels):
        _draw_panel(draw, panels, at, loops, launches)
        _, top, *_ = cell_box(panels, at, 0, 0)
        draw.text((LEFT, top - 34), panel.name, INK, _font(TEXT))
        note_at = (LEFT + launches * CELL_WIDTH, top - 32)
        draw.text(note_at, panel.note, PALE, _font(TEXT - 2), anchor="ra")
    _draw_axis(draw, height - FOOT, launches)
    _draw_legend(draw, height - 36, loops)
    image.save(path, "PNG", optimize=True)


def _height(panel: Panel) -> int:
    return PANEL_HEAD + len(panel.lines) * (CELL_HEIGHT + GAP)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _draw_panel(
    draw: ImageDraw, panels: Sequence[Panel], at: int, loops: int, launches: int
) -> None:
    for slot, cells in enumerate(panels[at].lines):
        left, top, _, bottom = cell_box(panels, at, slot, 0)
        middle = (left - 12, (top + bottom) // 2)
        draw.text(middle, f"slot {slot + 1}", INK, _font(SMALL + 1), anchor="rm")
        for launch, cell in enumerate(cells[:launches]):
            box = cell_box(panels, at, slot, launch)
            if cell is None:
                draw.rectangle(box, "#f4f4f4")
            else:
                _draw_cell(draw, box, cell, loops)


def _draw_cell(draw: ImageDraw, box: tuple[int, ...], cell: Cell, loops: int) -> None:
    left, top, right, bottom = box
    height = bottom + 1 - top
    for i, loop in enumerate(cell.loops):
        first = top + height * i // len(cell.loops)
        last = top + height * (i + 1) // len(cell.loops) - 1
        draw.rectangle((left, first, right, last), shade(loop, loops, cell.prompt))
    if cell.begins:
        background = shade(cell.loops[0], loops, cell.prompt)
        ink = "#ffffff" if is_dark(background) else INK
        middle = ((left + right + 1) // 2, (top + bottom) // 2)
        draw.text(middle, letter(cell.request), ink, _font(SMALL), anchor="mm")


def shade(loop: int, loops: int, prompt: bool) -> str:
    """A loop's colour; for a prompt's rows mixed with white."""
    own = colour(loop, loops)
    if not prompt:
        return own
    parts = (int(own[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{(part + 2 * 255) // 3:02x}" for part in parts)


def _draw_axis(draw: ImageDraw, top: int, launches: int) -> None:
    for launch in range(0, launches + 1, TICK_EVERY):
        x = LEFT + launch * CELL_WIDTH
        draw.line((x, top + 2, x, top + 8), INK)
        draw.text((x, top + 12), str(launch), INK, _font(SMALL), anchor="ma")
    middle = LEFT + launches * CELL_WIDTH // 2
    draw.text((middle, top + 32), "launches of the block", INK, _font(SMALL + 1), anchor="ma")


def _draw_legend(draw: ImageDraw, top: int, loops: int) -> None:
    entries = [
        (Cell(0, (loop,), prompt=False, begins=False), f"loop {loop + 1}") for loop in range(loops)
    ]
    entries += [
        (Cell(0, (0,), prompt=True, begins=False), "prompt"),
        (Cell(0, tuple(range(loops)), prompt=False, begins=False), "several tokens of a request"),
        (Cell(0, (0,), prompt=False, begins=True), "request A begins"),
    ]
    x = LEFT
    for cell, text in entries:
        _draw_cell(draw, (x, top - 4, x + CELL_WIDTH - 2, top + CELL_HEIGHT - 5), cell, loops)
        x += CELL_WIDTH + 8
        draw.text((x, top + 9), text, INK, _font(SMALL + 1), anchor="lm")
        x += int(draw.textlength(text, _font(SMALL + 1))) + 26
