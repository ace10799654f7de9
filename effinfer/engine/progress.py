"""A bar for ``generate``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from effinfer.engine.handle import Handle


def shown(handles: Sequence[Handle], progress: bool) -> Iterable[Handle]:
    """The handles, with a bar that moves as each has ended and been taken, if ``progress``."""
    return _with_bar(handles) if progress else handles


def _with_bar(handles: Sequence[Handle]) -> Iterator[Handle]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("requests", total=len(handles), tokens=0)
        tokens = 0
        for handle in handles:
            for _ in handle:
                tokens += 1
                bar.update(task, tokens=tokens)
            yield handle
            bar.update(task, advance=1)
