"""Turns a Hugging Face decoder into a recursive one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effinfer.errors import UnsupportedModelError
from effinfer.recursive.tying import tied_weight, truncated_svd

if TYPE_CHECKING:
    from effinfer.recursive.modeling import LoopProjection, RecursiveForCausalLM

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
INITS = ("stepwise", "average", "svd")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_PROJECTIONS = (*_QKV, "self_attn.o_proj", *_MLP)
_NORMS = ("input_layernorm", "post_attention_layernorm")


def to_recursive(
    model: Any, *, block_layers: int, loops: int, lora_rank: int = 0, init: str = "svd"
) -> RecursiveForCausalLM:
    """A recursive model that starts from the weights of a Hugging Face decoder.

    Layers are tied in a cycle: layer l becomes layer l mod ``block_layers`` of the block in loop
    l // ``block_layers``. Norms and biases stay as they are, each loop its own; projections become
    one tied matrix, and in each loop the low-rank factors that bring it nearest to the layer's
    ("Relaxed Recursive Transformers", arXiv 2410.20672). With ``lora_rank`` at least every
    matrix's smaller side the model computes what the old one did; with less it needs training.

    Args:
        model: llama, mistral, qwen2 or qwen3 with a language modelling head. Left unchanged.
        block_layers, loops: whose product is the number of the model's layers.
        lora_rank: of the additions in each loop; 0 for none.
        init: of the tied matrices: "stepwise", layers at even steps from the first to the last;
            "average", the mean of the layers that share it; "svd", the one whose low-rank
            completion is nearest to those layers (several SVDs of each matrix).

    Returns:
        ``RecursiveForCausalLM`` in the dtype, on the device and in the mode of ``model``.

    Raises:
        UnsupportedModelError: the model cannot be expressed so; the message has every reason.
        ValueError, TypeError: bad arguments.
    """
    _check_arguments(block_layers, loops, lora_rank, init)
    reasons = unsupported_reasons(model)
    if reasons:
        raise UnsupportedModelError("to_recursive: cannot convert: " + "; ".join(reasons))
    count = len(model.model.layers)
    if block_layers * loops != count:
        raise ValueError(
            f"to_recursive: block_layers times loops must be the model's {count} layers, "
            f"got {block_layers} x {loops}"
        )
    from effinfer.recursive.modeling import RecursiveForCausalLM

    weight = model.model.embed_tokens.weight
    recursive = RecursiveForCausalLM(_config(model, block_layers, loops, lora_rank))
    recursive.to(weight.device, weight.dtype).train(model.training)
    recursive.generation_config = copy.deepcopy(model.generation_config)
    with torch.no_grad():
        _copy_weights(model, recursive, init)
    return recursive


def unsupported_reasons(model: Any) -> list[str]:
    """Why ``to_recursive`` cannot express a model; empty where it can."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in MODEL_TYPES:
        return [f"model type {kind!r} is none of {', '.join(MODEL_TYPES)}"]
    if not hasattr(model, "lm_head"):
        return [f"{type(model).__name__} has no language modelling head"]
    return [
        *_config_reasons(config),
        *_layer_reasons(list(model.model.layers)),
        *_linear_reasons("lm_head", model.lm_head),
    ]


def _check_arguments(block_layers: int, loops: int, lora_rank: int, init: str) -> None:
    for name, value, low in (
        ("block_layers", block_layers, 1),
        ("loops", loops, 1),
        ("lora_rank", lora_rank, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"to_recursive: {name} must be an int, got {value!r}")
        if value < low:
            raise ValueError(f"to_recursive: {name} must be {low} or more, got {value}")
    if init not in INITS:
        raise ValueError(f"to_recursive: init must be one of {', '.join(INITS)}, got {init!r}")


def _config_reasons(config: Any) -> list[str]:
    from effinfer.recursive.config import ROPE_TYPES

    reasons = []
    if config.hidden_act != "silu":
        reasons.append(f"its activation is {config.hidden_act!r}, not 'silu'")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        reasons.append(f"its rope type {rope['rope_type']!r} is none of {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        reasons.append("it rotates only part of each head")
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        reasons.append("its layers mix full and sliding-window attention")
    return reasons


def _layer_reasons(layers: list[nn.Module]) -> list[str]:
    reasons = []
    for group in (_QKV, ("self_attn.o_proj",), _MLP):
        parts = {
            f"layer {i}'s {n}": x.get_submodule(n) for i, x in enumerate(layers) for n in group
        }
        for name, part in parts.items():
            reasons += _linear_reasons(name, part)
        if len({getattr(part, "bias", None) is None for part in parts.values()}) > 1:
            reasons.append(f"only some of its {', '.join(group)} have a bias")
    return reasons


def _linear_reasons(name: str, part: nn.Module) -> list[str]:
    if not isinstance(part, nn.Linear):
        return [f"{name} is a {type(part).__name__}, not a Linear"]
    if not part.weight.is_floating_point() or part.weight.is_meta:
        return [f"{name} has no float weights"]
    if name == "lm_head" and part.bias is not None:
        return ["lm_head has a bias"]
    return []


def _config(model: Any, block_layers: int, loops: int, lora_rank: int) -> Any:
    from effinfer.recursive.config import RecursiveConfig

    old, first = model.config, model.model.layers[0]
    windowed = set(getattr(old, "layer_types", None) or ["sliding_attention"])
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings"),
        *("initializer_range", "tie_word_embeddings", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    return RecursiveConfig(
        **{name: getattr(old, name) for name in same},
        head_dim=getattr(old, "head_dim", None),
        rope_parameters=dict(old.rope_parameters),
        sliding_window=(
            getattr(old, "sliding_window", None) if "sliding_attention" in windowed else None
        ),
        qkv_bias=first.self_attn.q_proj.bias is not None,
        o_bias=first.self_attn.o_proj.bias is not None,
        mlp_bias=first.mlp.gate_proj.bias is not None,
        qk_norm=hasattr(first.self_attn, "q_norm"),
        block_layers=block_layers,
        loops=loops,
        lora_rank=lora_rank,
    )


def _copy_weights(old: Any, new: Any, init: str) -> None:
    block = new.config.block_layers
    layers = list(old.model.layers)
    new.model.embed_tokens.weight.copy_(old.model.embed_tokens.weight)
    new.lm_head.weight.copy_(old.lm_head.weight)
    for r, loop in enumerate(new.model.loops):
        loop.norm.weight.copy_(old.model.norm.weight)
        for j, own in enumerate(loop.layers):
            _copy_norms(layers[r * block + j], own)
    for j, tied in enumerate(new.model.layers):
        step = round(j * (len(layers) - 1) / max(block - 1, 1))
        for path in _PROJECTIONS:
            name = path.rpartition(".")[2]
            _tie(
                [layer.get_submodule(path) for layer in layers[j::block]],
                layers[step].get_submodule(path),
                tied.projection(name),
                [loop.layers[j].get_submodule(name) for loop in new.model.loops],
                init,
            )


def _tie(
    sources: list[nn.Linear],
    stepwise: nn.Linear,
    tied: nn.Linear,
    owns: list[LoopProjection],
    init: str,
) -> None:
    """Fill one tied projection, and what each loop adds to it, from the loops' own."""
    weights = [_wide(source.weight) for source in sources]
    rank = 0 if owns[0].lora_A is None else owns[0].lora_A.shape[0]
    tied.weight.copy_(tied_weight(weights, _wide(stepwise.weight), rank, init))
    for source, weight, own in zip(sources, weights, owns, strict=True):
        if own.lora_A is not None and own.lora_B is not None:
            # from the tied weight as it was rounded, so that the factors make up for that too
            a, b = truncated_svd(weight - _wide(tied.weight), rank)
            own.lora_A.copy_(a)
            own.lora_B.copy_(b)
        if own.bias is not None:
            own.bias.copy_(source.bias)


def _copy_norms(old: Any, own: Any) -> None:
    for name in _NORMS:
        getattr(own, name).weight.copy_(getattr(old, name).weight)
    if own.q_norm is not None:
        own.q_norm.weight.copy_(old.self_attn.q_norm.weight)
        own.k_norm.weight.copy_(old.self_attn.k_norm.weight)


def _wide(weight: Tensor) -> Tensor:
    """In the precision that singular values need: float32, or more where it is there."""
    return weight.double() if weight.dtype == torch.float64 else weight.float()
