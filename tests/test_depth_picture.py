"""The picture of depths: the cells of a known trace, in a terminal and as a PNG."""

from __future__ import annotations

import pytest
from PIL import Image, ImageColor

from effinfer.depth_picture import PALETTE, Cell, colour, grid, legend, render
from effinfer.depth_png import Panel, cell_box, draw_png, shade
from effinfer.engine.wrappers import TracedRow

LOOPS = 3
# Request 40 has a prompt of two tokens and slot 0; its second token begins beside the first's last
# loop. Request 41 has one of one token and slot 1, and begins two launches later.
TRACE = [
    [TracedRow(0, 40, 0, 0), TracedRow(0, 40, 1, 0)],
    [TracedRow(0, 40, 0, 1), TracedRow(0, 40, 1, 1)],
    [TracedRow(0, 40, 2, 0), TracedRow(1, 41, 0, 0)],
    [TracedRow(0, 40, 2, 1)],
    [TracedRow(0, 40, 3, 0), TracedRow(0, 40, 2, 2), TracedRow(1, 41, 1, 0)],
]
PROMPTS = {40: 2, 41: 1}


@pytest.fixture
def lines():
    return grid(TRACE, PROMPTS, slots=2)


def test_cells_of_a_known_trace(lines):
    assert lines[0] == [
        Cell(0, (0,), prompt=True, begins=True),
        Cell(0, (1,), prompt=True, begins=False),
        Cell(0, (0,), prompt=False, begins=False),
        Cell(0, (1,), prompt=False, begins=False),
        Cell(0, (0, 2), prompt=False, begins=False),
    ]
    began = Cell(1, (0,), prompt=True, begins=True)
    assert lines[1] == [None, None, began, None, Cell(1, (0,), prompt=False, begins=False)]


def test_rendered_lines(lines):
    first, second = render(lines, LOOPS)
    assert first.plain == "slot 1  A2121"
    assert second.plain == "slot 2    B 1"
    styles = {span.start: span.style for span in first.spans}
    assert styles[8].bgcolor is None  # the prompt is on no colour
    assert styles[8].color.name == PALETTE[0]
    assert styles[11].bgcolor.name == colour(1, LOOPS)
    assert (bool(styles[11].underline), bool(styles[12].underline)) == (False, True)


def test_no_line_is_wider_than_asked(lines):
    assert [line.plain for line in render(lines, LOOPS, width=10)] == ["slot 1  A2", "slot 2    "]
    assert len(legend(4).plain) <= 80


@pytest.mark.parametrize("loops", [1, 2, 3, 4])
def test_every_loop_has_a_colour_of_its_own(loops):
    colours = [colour(loop, loops) for loop in range(loops)]
    assert len(set(colours)) == loops
    assert colours[0] == PALETTE[0]


def test_png_has_the_cells_colours(lines, tmp_path):
    path = tmp_path / "depths.png"
    panels = [Panel("one", "note", lines), Panel("two", "note", lines[::-1])]
    draw_png(path, "title", panels, LOOPS, launches=5)
    with Image.open(path) as image:
        pixels = image.convert("RGB")

    def corner(panel: int, slot: int, launch: int, bottom: bool = False) -> tuple[int, ...]:
        left, top, right, last = cell_box(panels, panel, slot, launch)
        return pixels.getpixel((right, last) if bottom else (left, top))

    def rgb(loop: int, prompt: bool = False) -> tuple[int, ...]:
        return ImageColor.getrgb(shade(loop, LOOPS, prompt))

    assert corner(0, 0, 0) == rgb(0, prompt=True) != rgb(0)
    assert corner(0, 0, 3) == corner(1, 1, 3) == rgb(1) == ImageColor.getrgb(colour(1, LOOPS))
    assert (corner(0, 0, 4), corner(0, 0, 4, bottom=True)) == (rgb(0), rgb(2))
    assert corner(0, 1, 0) == corner(1, 0, 0) not in [rgb(loop) for loop in range(LOOPS)]
