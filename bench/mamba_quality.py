"""The carried Mamba language model quantized: held-out perplexity, and a plan of 3 bits on average."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lm_training import (
    download_documents,
    held_out_batches,
    read_documents,
    score,
    token_stream,
)
from quality_common import Quantizer, cases
from torch import nn
from train_demo import stock_cost
from transformers import AutoModelForCausalLM, AutoTokenizer

import effinfer
from effinfer.models import demo_path
from effinfer.quant import QuantConfig, packed_bytes

GROUP_SIZE, ROWS, LENGTH = 32, 4, 512
CALIBRATION_BATCHES, EVERY = 4, 32  # batches to calibrate on; one in so many to evaluate on
LRP_TOKENS = 64
CONFIG = QuantConfig(group_size=GROUP_SIZE)
AVERAGE_BITS, PLAN_METHOD = 3, "gptq+cd"


def load() -> tuple[nn.Module, Any]:
    """Stock but for the scan and the norms, which the fast ones compute alike: linears stay plain."""
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()
    effinfer.patch(model, features=("mixer", "norm"))
    return model, AutoTokenizer.from_pretrained(demo_path())


class Bench:
    """The model, statistics of its inputs on training text, and held-out text to score it on."""

    def __init__(self, text: Path | None) -> None:
        self.model, self.tokenizer = load()
        every = read_documents(text) if text else download_documents()
        training = token_stream(self.tokenizer, [d for d in every if not d.held_out])
        held_out = token_stream(self.tokenizer, [d for d in every if d.held_out])
        apart = len(training) // CALIBRATION_BATCHES
        self.calibration = [
            training[i * apart : i * apart + ROWS * LENGTH].view(ROWS, LENGTH)
            for i in range(CALIBRATION_BATCHES)
        ]
        self.groups = held_out_batches(held_out, ROWS, LENGTH)[::EVERY]
        self.quantizer = Quantizer(self.model, CONFIG, [((ids,), {}) for ids in self.calibration])

    def row(self, network: nn.Module, **facts: Any) -> dict[str, Any]:
        """``facts`` with the perplexity of ``network``."""
        result = score(stock_cost(network), self.groups, self.tokenizer)
        facts |= {"perplexity": result.perplexity, "bits per byte": result.bits_per_byte}
        print(facts, flush=True)
        return facts


@torch.no_grad()
def measure(text: Path | None) -> dict[str, Any]:
    """Perplexity of held-out documents, every method at every number of bits."""
    bench = Bench(text)
    stock, rows = bench.row(bench.model), []
    for bits, method in cases():
        network, size = bench.quantizer.quantized(bits, method)
        rows.append(bench.row(network, bits=bits, method=method, bytes=size))
    return {
        "model": "mamba-demo",
        "group_size": GROUP_SIZE,
        "activations": CONFIG.activations,
        "calibration tokens": CALIBRATION_BATCHES * ROWS * LENGTH,
        "evaluation tokens": len(bench.groups) * ROWS * LENGTH,
        "float bytes": bench.quantizer.float_bytes(),
        "float": stock,
        "rows": rows,
    }


@torch.no_grad()
def measure_plans(text: Path | None) -> dict[str, Any]:
    """Perplexity at the bytes of 3 bits everywhere: a plan by every metric, and no plan."""
    bench = Bench(text)
    budget = packed_bytes(bench.model, AVERAGE_BITS, CONFIG)
    network, size = bench.quantizer.quantized(AVERAGE_BITS, PLAN_METHOD)
    rows = [bench.row(network, metric="(3 bits everywhere)", bytes=size)]
    for metric in ("loss", "lim", "zd", "ompq", "lrp"):
        start = time.perf_counter()
        if metric == "lrp":  # relevance needs gradients, which the stock scan has: few tokens
            network = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()
            ids = bench.calibration[0][:1, :LRP_TOKENS]
        else:
            network, ids = bench.model, bench.calibration[0][:1]
        plan = effinfer.plan_bits(
            network, budget, metric=metric, calibration=[{"input_ids": ids}], config=CONFIG
        )
        taken = time.perf_counter() - start
        network, size = bench.quantizer.quantized(AVERAGE_BITS, PLAN_METHOD, plan)
        row = bench.row(network, metric=metric, bytes=size)
        rows.append(row | {"plan": plan, "seconds to plan": taken})
    return {"budget": budget, "method": PLAN_METHOD, "rows": rows}
