"""A pytest plugin for slow machines: of each test, one case for each backend and dtype."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases: dict[tuple[object, ...], list[pytest.Item]] = {}
    for item in items:
        spec = getattr(item, "callspec", None)
        params = spec.params if spec is not None else {}
        key = (item.nodeid.split("[")[0], params.get("device"), params.get("dtype"))
        cases.setdefault(key, []).append(item)
    # Neither the smallest nor the largest: parameters are listed in that order.
    kept = [alike[len(alike) // 2] for alike in cases.values()]
    left = [item for item in items if item not in kept]
    config.hook.pytest_deselected(items=left)
    items[:] = kept
