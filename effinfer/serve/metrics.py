"""Prometheus metrics, under vLLM's names where it has one, and what the live page shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from effinfer.engine import Handle
from effinfer.engine.handle import FINISH_REASONS
from effinfer.serve.supervisor import Supervisor

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
# Engine counts that are scraped as they stand: name, key, what it is.
_COUNTERS = (
    ("vllm:prompt_tokens", "prompt_tokens", "Prompt tokens of submitted requests"),
    ("vllm:generation_tokens", "tokens", "Tokens generated"),
    ("vllm:prefix_cache_queries", "prompt_tokens", "Prompt tokens looked up in the prefix cache"),
    ("vllm:prefix_cache_hits", "prefix_hit_tokens", "Prompt tokens found in the prefix cache"),
    ("vllm:spec_decode_num_accepted_tokens", "drafts_accepted", "Drafted tokens that were right"),
    ("effinfer:draft_rows_wasted", "drafts_flushed", "Rows launched for drafts that were wrong"),
    ("effinfer:exits_checked", "exits_checked", "Early exits held against full depth"),
    ("effinfer:exits_agreed", "exits_agreed", "Of these, those with full depth's token"),
    ("effinfer:launches", "launches", "Launches of the model's loop"),
    ("effinfer:launch_seconds", "launch_seconds", "Seconds in the model"),
    ("effinfer:choose_seconds", "choose_seconds", "Seconds in exit policies and sampling"),
    ("effinfer:step_seconds", "step_seconds", "Seconds in steps that launched"),
)
_GAUGES = (
    ("vllm:num_requests_running", "running", "Requests that have a slot"),
    ("vllm:num_requests_waiting", "waiting", "Requests that wait for one"),
    ("effinfer:queue_tokens", "queue_tokens", "Tokens of waiting requests"),
    ("effinfer:rows_per_launch", "rows_per_launch", "Mean rows of a launch"),
    ("effinfer:draft_acceptance", "draft_acceptance", "Running mean of drafts that were right"),
)
_KINDS = ("prefill", "decode", "fill", "verify", "draft")


class Metrics:
    """Scraped from the engine at each request for them; latencies are observed as requests end."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._registry = CollectorRegistry()
        self._registry.register(self)

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(name, what, buckets=_SECONDS, registry=self._registry)

        self._first_token = histogram("vllm:time_to_first_token_seconds", "To the first token")
        self._each_token = histogram(
            "vllm:time_per_output_token_seconds", "Per token after the first"
        )
        self._latency = histogram("vllm:e2e_request_latency_seconds", "From submission to end")

    def observe(self, handles: Sequence[Handle]) -> None:
        """Count the latencies of those that have ended; a gone client's have not, and tell nothing."""
        for handle in handles:
            if handle.finish_reason is None:
                continue
            timings = handle.timings
            self._latency.observe(timings.total)
            if timings.first_token is not None:
                self._first_token.observe(timings.first_token)
                if len(handle.tokens) > 1:
                    after = timings.total - timings.first_token
                    self._each_token.observe(after / (len(handle.tokens) - 1))

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client asks for at each scrape."""
        supervisor = self._supervisor
        yield GaugeMetricFamily("effinfer:ready", "1 while requests are taken", supervisor.ready)
        yield CounterMetricFamily("effinfer:restarts", "Engines restarted", supervisor.restarts)
        yield CounterMetricFamily(
            "effinfer:requests_rejected", "Requests answered 429", supervisor.rejected
        )
        yield GaugeMetricFamily(
            "effinfer:admitted_tokens", "Tokens of unfinished requests", supervisor.queued_tokens
        )
        stats = self._stats()
        if not stats:
            return
        for name, key, what in _COUNTERS:
            yield CounterMetricFamily(name, what, stats[key])
        for name, key, what in _GAUGES:
            yield GaugeMetricFamily(name, what, stats[key])
        free = (
            stats["free_blocks"] + stats["idle_blocks"]
        )  # idle: kept for prompts that begin alike
        used = 1 - free / max(stats["total_blocks"], 1)
        yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "Blocks in use, of 1", used)
        yield _labelled(
            "vllm:request_success", "Requests ended", "finished_reason",
            {reason: stats["finished"][reason] for reason in FINISH_REASONS},
        )  # fmt: skip
        yield _labelled(
            "effinfer:rows", "Rows launched, by what they are for", "kind",
            {kind: stats[f"{kind}_rows"] for kind in _KINDS},
        )  # fmt: skip
        yield _depths(stats["depths"])
        yield _labelled(
            "effinfer:rows_at_loop", "Rows launched at each loop", "loop",
            {str(loop): count for loop, count in enumerate(stats["rows_at_loop"])},
        )  # fmt: skip

    def render(self) -> tuple[bytes, str]:
        """The scrape, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def live(self) -> dict[str, Any]:
        """What the page draws: counts, and each running request's depth."""
        supervisor = self._supervisor
        return {
            "ready": supervisor.ready,
            "restarts": supervisor.restarts,
            "admitted_tokens": supervisor.queued_tokens,
            "engine": self._stats(),
        }

    def _stats(self) -> dict[str, Any]:
        """The engine's counts; tokens as they come, which the engine counts as requests end."""
        engine = self._supervisor.engine
        if engine is None:
            return {}
        stats = engine.stats()
        return {
            **stats,
            "mode": engine.mode,
            "max_slots": engine.max_slots,
            "tokens": sum(stats["depths"]),
            "total_blocks": engine.pools.blocks,
        }


def _depths(tokens: Sequence[int]) -> Metric:
    """A histogram of the loops that tokens took; ``tokens[i]`` took i + 1."""
    below = [*itertools.accumulate(tokens)]
    buckets = [*((str(loop + 1), count) for loop, count in enumerate(below)), ("+Inf", below[-1])]
    total = sum((loop + 1) * count for loop, count in enumerate(tokens))
    return HistogramMetricFamily(
        "effinfer:token_depth", "Loops that tokens took", buckets=buckets, sum_value=total
    )


def _labelled(name: str, what: str, label: str, counts: dict[str, float]) -> Metric:
    family = CounterMetricFamily(name, what, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
