"""The recursive demo: plain continuous batching beside depth-wise batching, on a mixed workload."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import effinfer
from effinfer.demo import progress_bars
from effinfer.depth_picture import grid, legend, render
from effinfer.depth_png import Panel, draw_png, require_pillow
from effinfer.engine import policies
from effinfer.engine.engine import Engine
from effinfer.engine.params import SamplingParams
from effinfer.engine.runner import make_runner
from effinfer.engine.wrappers import LockstepRunner, TracedRow, TracedRunner
from effinfer.loading import load_model
from effinfer.models import recursive_demo_path

ROUNDS = 4  # each side in turn; the first warms up
PNG_LAUNCHES = 100
# Prompt tokens, and the share of the longest output, of each request: short and long mixed.
REQUESTS = (
    *((24, 0.5), (64, 0.25), (8, 1.0), (96, 0.125), (16, 0.75), (48, 0.25)),
    *((8, 0.5), (80, 1.0), (32, 0.125), (12, 0.25), (56, 0.75), (20, 0.5)),
)
EXPLANATION = (
    "Loops that an exit skips run later, so that keys and values stay exact: it saves launches, "
    "not rows. That pays where a launch takes the time of reading the weights; those of this small "
    "model lie in the cache."
)
Request = tuple[list[int], int]  # a prompt and the tokens to generate


@dataclass
class Side:
    """One way to run the workload.

    Attributes:
        name: what the table calls it.
        engine: that runs it.
        traced: what notes the engine's launches.
        seconds: that each round took.
        tokens: that each request got, in the last round.
        depths: tokens by the loops after which they were first known, in the last round.
        progress: tokens there were after each launch of the last round.
    """

    name: str
    engine: Engine
    traced: TracedRunner
    seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    progress: list[int] = field(default_factory=list)
    prompt_tokens: dict[int, int] = field(default_factory=dict)

    @property
    def launches(self) -> list[list[TracedRow]]:
        """Of the block, in the last round."""
        return self.traced.launches

    @property
    def generated(self) -> int:
        """Tokens of the last round."""
        return sum(map(len, self.tokens))

    def mean_depth(self, loops: int) -> float:
        """Loops after which a token was first known; all of them where no token can leave."""
        if len(self.depths) == 1:
            return loops
        return sum(n * (i + 1) for i, n in enumerate(self.depths)) / sum(self.depths)

    def run(self, requests: list[Request]) -> None:
        """Run the workload once, all requests submitted at the start."""
        before = self.engine.stats()["depths"]
        self.traced.launches.clear()
        self.progress.clear()
        start = time.perf_counter()
        handles = [
            self.engine.submit(prompt, SamplingParams(max_tokens=count, ignore_eos=True))
            for prompt, count in requests
        ]
        while self.engine.step():
            there = sum(len(handle.tokens) for handle in handles)
            self.progress += [there] * (len(self.launches) - len(self.progress))
        self.seconds.append(time.perf_counter() - start)
        self.tokens = [handle.tokens for handle in handles]
        self.prompt_tokens = {handle.request_id: len(handle.prompt) for handle in handles}
        after = self.engine.stats()["depths"]
        self.depths = [n - m for n, m in zip(after, before, strict=True)]


def make_requests(ids: list[int], longest: int) -> list[Request]:
    """The workload: prompts cut from all over ``ids``, outputs of up to ``longest`` tokens."""
    requests = []
    for i, (prompt, share) in enumerate(REQUESTS):
        start = max(len(ids) - prompt, 0) * i // (len(REQUESTS) - 1)
        requests.append((ids[start : start + prompt], max(1, round(share * longest))))
    return requests


def make_sides(model: Any, longest: int, slots: int) -> list[Side]:
    """Plain batching, and depth-wise with the exits in the model's configuration and with drafts."""
    positions = max(prompt for prompt, _ in REQUESTS) + longest
    sides = []
    for name, mode in (("plain", "full"), ("exit", "exit"), ("lossless", "lossless")):
        traced = TracedRunner(make_runner(model))
        engine = Engine(
            LockstepRunner(traced) if name == "plain" else traced,
            mode=mode,
            policy=policies.from_config(model.config.exit) if mode == "exit" else None,
            max_slots=slots,
            max_positions=positions,
            prefix_cache=False,  # every round has the same prompts
        )
        sides.append(Side(name, engine, traced))
    return sides


@torch.inference_mode()
def agreement(model: Any, requests: list[Request], outputs: list[list[int]]) -> float:
    """Share of tokens that are full depth's, given the same tokens before them."""
    right = count = 0
    for (prompt, _), tokens in zip(requests, outputs, strict=True):
        ids = torch.tensor([prompt + tokens])
        deep = model(ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].argmax(-1)
        right += int((deep == ids[0, len(prompt) :]).sum())
        count += len(tokens)
    return right / count


def run_recursive_demo(
    prompt: str,
    longest: int,
    loops: int = 4,
    slots: int = 4,
    threads: int | None = None,
    picture: Path | None = None,
) -> bool:
    """Run the workload in each way, in turn, and print pictures and a table.

    Args:
        prompt: the text that prompts are cut from.
        longest: tokens of the longest output.
        loops: of the carried model, 2 or 4.
        slots: requests that run at once.
        picture: a PNG file to write.

    Returns:
        Whether the tokens of "lossless" are full depth's.

    Raises:
        ValueError: the longest request exceeds the model's context.
        EffinferError, OSError: the picture can't be drawn or written.
    """
    console = Console()
    if picture is not None:
        require_pillow()
    if threads is not None:
        torch.set_num_threads(threads)
    with progress_bars(console) as progress:
        task = progress.add_task("loading the model", total=None)
        model, tokenizer = load_model(recursive_demo_path(loops))
        requests = make_requests(tokenizer(prompt)["input_ids"], longest)
        sides = make_sides(model, longest, slots)
        progress.remove_task(task)
        try:
            _run_rounds(sides, requests, progress)
        finally:
            for side in sides:
                side.engine.close()
        agreements = [agreement(model, requests, side.tokens) for side in sides]
    _show_pictures(console, sides, loops, slots)
    console.print(_table(sides, loops, agreements))
    console.print(EXPLANATION, style="dim", highlight=False)
    if picture is not None:
        _draw(picture, sides, loops, slots)
        console.print(f"picture: {picture}", highlight=False, soft_wrap=True)
    same = sides[2].tokens == sides[0].tokens
    console.print(
        "[green]lossless: every token is full depth's[/]"
        if same
        else "[red]lossless: tokens differ from full depth's[/]"
    )
    stored = model.config.exit
    console.print(
        f"{len(requests)} requests, {slots} slots, exit by {stored['policy']} > "
        f"{stored['threshold']:.3g}, {torch.get_num_threads()} threads, "
        f"{effinfer.backend_info()['isa']}",
        highlight=False,
    )
    return same


def _run_rounds(sides: list[Side], requests: list[Request], progress: Progress) -> None:
    task = progress.add_task("", total=ROUNDS * len(sides))
    for _ in range(ROUNDS):
        for side in sides:
            progress.update(task, description=side.name)
            side.run(requests)
            progress.advance(task)


def _show_pictures(console: Console, sides: list[Side], loops: int, slots: int) -> None:
    for side in sides:
        lines = grid(side.launches, side.prompt_tokens, slots)
        shown = render(lines, loops, min(console.width, 80))
        console.print(_title(side), style="bold")
        for line in shown:
            console.print(line, no_wrap=True, overflow="crop")
    console.print(legend(loops))


def _title(side: Side) -> str:
    return {
        "plain": "plain continuous batching: the rows of a launch are all at one depth",
        "exit": "depth-wise, exit: a sure token is taken early, its other loops run later",
        "lossless": "depth-wise, lossless: a sure token is a draft, its other loops check it",
    }[side.name]


def _table(sides: list[Side], loops: int, agreements: list[float]) -> Table:
    table = Table("", *(side.name for side in sides), title="the same requests, three ways")
    reference = sides[0].tokens

    def add(name: str, value: Callable[[Side], str]) -> None:
        table.add_row(name, *map(value, sides))

    def rows(side: Side) -> float:
        return sum(map(len, side.launches)) / len(side.launches)

    def same_texts(side: Side) -> str:
        same = sum(a == b for a, b in zip(side.tokens, reference, strict=True))
        return f"{same} of {len(reference)}"

    add("tokens", lambda side: f"{side.generated:,}")
    add("launches of the block", lambda side: f"{len(side.launches):,}")
    add("launches per token", lambda side: f"{len(side.launches) / side.generated:.2f}")
    add("rows per launch", lambda side: f"{rows(side):.1f}")
    add("mean depth when known", lambda side: f"{side.mean_depth(loops):.2f} of {loops}")
    # After the round that warms up; the median, for others may use the machine.
    add("tokens/s", lambda s: f"{s.generated / statistics.median(s.seconds[1:]):,.0f}")
    table.add_row("full depth's token, same text before", *(f"{each:.1%}" for each in agreements))
    add("requests with plain's whole text", same_texts)
    return table


def _draw(path: Path, sides: list[Side], loops: int, slots: int) -> None:
    launches = min(PNG_LAUNCHES, max(len(side.launches) for side in sides))
    panels = []
    for side in sides:
        there = side.progress[min(launches, len(side.progress)) - 1]
        note = f"{there} tokens after {launches} launches"
        panels.append(Panel(_title(side), note, grid(side.launches, side.prompt_tokens, slots)))
    title = f"Which request sat at which depth: a block of {loops} loops, {slots} slots"
    draw_png(path, title, panels, loops, launches)
