"""The demo: one small carried model, stock and patched, on the same prompt."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import effinfer
from effinfer.loading import load_model
from effinfer.models import demo_path
from effinfer.quant.config import Bits

DEFAULT_PROMPT = """\
The :mod:`json` module
======================

Encode basic Python object hierarchies as JSON text and read them back.  The interface is close to
that of the :mod:`pickle` module: :func:`dump` writes an object to a file, :func:`dumps` returns it
as a :class:`str`, :func:`load` reads a file and :func:`loads` reads a string.  Be careful with data
from a source that you do not trust: a large document can use a lot of memory.

.. function:: dumps(obj, *, skipkeys=False, ensure_ascii=True)

   Return *obj* as a JSON formatted :class:`str`.  If *skipkeys* is true, keys that are not of a
   basic type are skipped instead of raising a :exc:`TypeError`.

"""


@dataclass
class Run:
    """One generation, timed: prefill ends with the first new token."""

    tokens: list[int]
    prefill_seconds: float
    decode_seconds: float
    peak_bytes: int | None


class _Clock:
    """A ``generate`` streamer that notes when tokens come and moves a progress bar."""

    def __init__(self, advance: Any) -> None:
        self._advance = advance
        self._prompt_seen = False
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # generate hands the prompt over first
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self._advance()

    def end(self) -> None:
        pass


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the table says n/a
        Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _generate(model: Any, ids: torch.Tensor, tokens: int, advance: Any) -> Run:
    with torch.inference_mode():
        model.generate(ids[:, :8], max_new_tokens=4, do_sample=False)  # warm-up
        _reset_peak_memory()
        before = _memory("VmRSS")
        clock = _Clock(advance)
        start = time.perf_counter()
        out = model.generate(
            ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock
        )
    peak = _memory("VmHWM")
    return Run(
        tokens=out[0, ids.shape[1] :].tolist(),
        prefill_seconds=clock.times[0] - start,
        decode_seconds=clock.times[-1] - clock.times[0],
        peak_bytes=None if peak is None or before is None else peak - before,
    )


def _rows(prompt_tokens: int, new_tokens: int, stock: Run, patched: Run) -> list[tuple[str, ...]]:
    def rate(count: int, seconds: float) -> str:
        return f"{count / seconds:,.0f} tokens/s" if seconds > 0 else "n/a"

    def ratio(a: float, b: float) -> str:
        return f"{a / b:.1f}x" if b > 0 else "n/a"

    def megabytes(size: int | None) -> str:
        return "n/a" if size is None else f"{size / 2**20:.0f} MB"

    rows: list[tuple[str, ...]] = [
        (
            f"prefill, {prompt_tokens} tokens",
            rate(prompt_tokens, stock.prefill_seconds),
            rate(prompt_tokens, patched.prefill_seconds),
            ratio(stock.prefill_seconds, patched.prefill_seconds),
        )
    ]
    if new_tokens > 1:
        rows.append(
            (
                f"decode, {new_tokens} tokens",
                rate(new_tokens - 1, stock.decode_seconds),
                rate(new_tokens - 1, patched.decode_seconds),
                ratio(stock.decode_seconds, patched.decode_seconds),
            )
        )
    rows.append(
        (
            "peak memory over the model",
            megabytes(stock.peak_bytes),
            megabytes(patched.peak_bytes),
            "",
        )
    )
    return rows


def _bits_name(bits: Bits) -> str:
    """What the table calls a model of so many bits."""
    return bits if isinstance(bits, str) else f"{bits:g} bits"


def _size_row(before: int, after: int) -> tuple[str, ...]:
    sizes = (f"{size / 2**20:.1f} MB" for size in (before, after))
    return "weights", *sizes, f"{before / after:.1f}x"


def _perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of every token of ``ids`` (1, L) after the first."""
    with torch.inference_mode():
        return float(model(ids, labels=ids, use_cache=False).loss.exp())


def _agreement(stock: list[int], ours: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    return next((i for i, (a, b) in enumerate(zip(stock, ours, strict=True)) if a != b), len(stock))


def progress_bars(console: Console) -> Progress:
    """Bars with counts and times, gone when done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def run_demo(
    prompt: str, tokens: int, threads: int | None = None, bits: Bits | None = None
) -> bool:
    """Generate ``tokens`` tokens stock and patched, print the comparison; True when they agree.

    With ``bits``, our side is quantized to the nearest as well. What that costs is shown: tokens
    until the first difference, and the perplexity of the prompt on both sides.
    """
    console = Console()
    if threads is not None:
        torch.set_num_threads(threads)
    with progress_bars(console) as progress:
        task = progress.add_task("loading the model", total=None)
        model, tokenizer = load_model(demo_path())
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        progress.remove_task(task)

        def generate(label: str) -> Run:
            task = progress.add_task(label, total=tokens)
            return _generate(model, ids, tokens, lambda: progress.advance(task))

        stock = generate("stock transformers")
        quantized = None
        if bits is not None:
            surprise = [_perplexity(model, ids)]
            quantized = effinfer.quantize_(model, effinfer.QuantConfig(bits=bits), progress=False)
        report = effinfer.patch(model)
        patched = generate("effinfer")

    console.print(tokenizer.decode(patched.tokens), style="dim", markup=False, highlight=False)
    if quantized is not None:
        console.print(str(quantized), highlight=False, markup=False)
    console.print(str(report), highlight=False, markup=False)
    ours = "effinfer" if bits is None else f"effinfer, {_bits_name(bits)}"
    title = "the same model, the same prompt"
    if bits is not None:
        title = "the same prompt; the model as it is, and quantized"
    table = Table("", "transformers", ours, "ratio", title=title)
    for row in _rows(ids.shape[1], tokens, stock, patched):
        table.add_row(*row)
    if quantized is not None:
        surprise.append(_perplexity(model, ids))
        table.add_row(*_size_row(quantized.bytes_before, quantized.bytes_after))
        table.add_row("perplexity of the prompt", *(f"{p:.2f}" for p in surprise), "")
    console.print(table)
    same = stock.tokens == patched.tokens
    if bits is None:
        verdict = "[green]tokens identical[/]" if same else "[red]tokens differ[/]"
    else:
        agreeing = _agreement(stock.tokens, patched.tokens)
        verdict = f"the first {agreeing} of {tokens} tokens are the float model's"
    console.print(
        verdict,
        f"({tokens} greedy tokens, {torch.get_num_threads()} threads, "
        f"{effinfer.backend_info()['isa']})",
        highlight=False,
    )
    return same
