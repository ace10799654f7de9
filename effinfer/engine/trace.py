"""A schedule trace: one JSON line per launch, for plots and for looking at what the scheduler did."""

from __future__ import annotations

import json
from typing import Any, TextIO


def write_launch(file: TextIO, scheduler: Any, now: float) -> None:
    """Append the launch that ``scheduler`` has planned to ``file``.

    A line holds ``time``; ``rows``, as [request id, position, loop] each; and ``wanted``, the rows
    whose logits are asked for, as [request id, position, loop, whether drafts stand before it].
    Call it between ``plan`` and ``commit``.
    """
    n, wanted = scheduler.n_rows, scheduler.n_wanted
    ids = scheduler.request_ids[scheduler.lines[:n]].tolist()
    positions, loops = scheduler.positions[:n].tolist(), scheduler.loops[:n].tolist()
    rows = list(zip(ids, positions, loops, strict=True))
    drafts = scheduler.wanted_draft[:wanted].tolist()
    asked = [
        (*rows[row], bool(draft))
        for row, draft in zip(scheduler.wanted[:wanted].tolist(), drafts, strict=True)
    ]
    json.dump({"time": now, "rows": rows, "wanted": asked}, file)
    file.write("\n")
