"""What a llama-like or recursive decoder is made of, read off the Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effinfer.engine.projection import linear_reasons
from effinfer.patch.direct import is_bare

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Families whose decoder layers differ in nothing but biases, norms of queries and keys, and windows.
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# Their angles depend on nothing but the position.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Addition:
    """What a loop adds to a tied projection: ``B A x + bias``, each part optional."""

    lora_A: torch.Tensor | None
    lora_B: torch.Tensor | None
    bias: torch.Tensor | None


@dataclass(frozen=True)
class LoopLayer:
    """What one loop has of its own in one layer; the norms' weights are float32."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    additions: dict[str, Addition]


@dataclass(frozen=True)
class DecoderLayer:
    """The projections of a layer, by name, and what each loop has of its own in it."""

    linears: dict[str, nn.Module]
    loops: list[LoopLayer]
    window: int | None

    def features(self, name: str) -> int:
        """Outputs of a projection."""
        linear: Any = self.linears[name]
        return int(linear.out_features)


@dataclass(frozen=True)
class DecoderModel:
    """A decoder: embedding, a block of layers run in ``loops`` loops, final norms, head."""

    embedding: torch.Tensor
    layers: list[DecoderLayer]
    final_norms: list[torch.Tensor]
    head: nn.Module
    rotary: nn.Module
    eps: float
    q_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    r_min: int
    kv_policy: str

    @property
    def loops(self) -> int:
        """R, how often the block runs."""
        return len(self.final_norms)

    def rotations(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``(positions, rotary_dim)`` as the model's own rotary gives them."""
        like = torch.empty(1, dtype=torch.float32)
        cos, sin = self.rotary(like, torch.arange(positions)[None])
        return cos[0].contiguous(), sin[0].contiguous()


def describe(model: Any) -> DecoderModel | list[str]:
    """The decoder in ``model``, or why it is not one of these."""
    name = type(model).__name__
    module = type(model).__module__
    recursive = module.startswith("effinfer.recursive") and name == "RecursiveForCausalLM"
    family = getattr(getattr(model, "config", None), "model_type", None)
    if not recursive and FAMILIES.get(str(family), "-") + "ForCausalLM" != name:
        return [f"it is not a recursive model or one of {', '.join(FAMILIES)}"]
    reasons = list(dict.fromkeys(_reasons(model, recursive)))
    if reasons:
        return reasons
    config, inner = model.config, model.model
    layers = _recursive_layers(inner) if recursive else _layers(inner, config)
    norms = [loop.norm for loop in inner.loops] if recursive else [inner.norm]
    attention = inner.layers[0].self_attn
    return DecoderModel(
        embedding=inner.embed_tokens.weight.detach(),
        layers=layers,
        final_norms=[_float(norm) for norm in norms],
        head=model.lm_head,
        rotary=inner.rotary_emb,
        eps=float(config.rms_norm_eps),
        q_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim if recursive else attention.head_dim,
        max_positions=config.max_position_embeddings,
        r_min=config.r_min if recursive else 1,
        kv_policy=config.kv_policy if recursive else "depth",
    )


def _reasons(model: Any, recursive: bool) -> Iterator[str]:
    """Why the model, though of a known family, cannot run from its weights alone."""
    config = model.config
    if config.hidden_act != "silu":
        yield f"its activation is {config.hidden_act}, not silu"
    rope = config.rope_parameters["rope_type"]
    if rope not in ROPE_TYPES:
        yield f"its rope type is {rope}, not one of {', '.join(ROPE_TYPES)}"
    if model.training:
        yield "it is in training mode: call model.eval()"
    for name, module in model.named_modules():
        if not is_bare(module):
            yield f"{name or 'the model'} has hooks or another forward"
        base = getattr(type(module), "_effinfer_base", type(module)).__name__
        prefix = FAMILIES.get(config.model_type, "")
        if name.endswith(("norm", "self_attn", "mlp")) and not (
            recursive or base.startswith(prefix)
        ):
            yield f"{name} is a {base}, not one of {prefix}'s modules"
    linears = {"lm_head": model.lm_head}
    for index, layer in enumerate(model.model.layers):
        linears |= {f"layers.{index}.{n}": linear for n, linear in _linears(layer).items()}
    for name, linear in linears.items():
        yield from (f"{name}: {reason}" for reason in linear_reasons(linear))
    for name, weight in model.named_parameters():
        if not weight.is_cpu:
            yield f"{name} is on {weight.device}, and this runner is for the CPU"
            break
    embedding = model.model.embed_tokens
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        yield "its embedding is not a plain nn.Embedding"


def _float(norm: Any) -> torch.Tensor:
    weight: torch.Tensor = norm.weight.detach()
    return weight.float()


def _optional(owner: Any, name: str) -> torch.Tensor | None:
    norm = getattr(owner, name, None)
    return None if norm is None else _float(norm)


def _linears(layer: Any) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {n: getattr(layer.self_attn, n) for n in ATTENTION}
    return parts | {n: getattr(layer.mlp, n) for n in MLP}


def _layers(inner: Any, config: Any) -> list[DecoderLayer]:
    layers = []
    for layer in inner.layers:
        attention = layer.self_attn
        # Mistral has one window for all layers in its configuration; in Qwen, layers have theirs.
        uniform = config.sliding_window if config.model_type == "mistral" else None
        own = LoopLayer(
            _float(layer.input_layernorm),
            _float(layer.post_attention_layernorm),
            _optional(attention, "q_norm"),
            _optional(attention, "k_norm"),
            {},
        )
        window = getattr(attention, "sliding_window", uniform)
        layers.append(DecoderLayer(_linears(layer), [own], window))
    return layers


def _recursive_layers(inner: Any) -> list[DecoderLayer]:
    layers = []
    for index, tied in enumerate(inner.layers):
        loops = [_loop_layer(loop.layers[index]) for loop in inner.loops]
        layers.append(DecoderLayer(_linears(tied), loops, inner.config.sliding_window))
    return layers


def _loop_layer(own: Any) -> LoopLayer:
    additions = {}
    for name in (*ATTENTION, *MLP):
        part = getattr(own, name, None)  # a loop that attends to loop 0's has no keys and values
        if part is not None and (part.lora_A is not None or part.bias is not None):
            parts = (part.lora_A, part.lora_B, part.bias)
            additions[name] = Addition(*(None if p is None else p.detach() for p in parts))
    return LoopLayer(
        _float(own.input_layernorm),
        _float(own.post_attention_layernorm),
        _optional(own, "q_norm"),
        _optional(own, "k_norm"),
        additions,
    )
