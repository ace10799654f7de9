"""Shape of a recursive language model: one block of layers run several times, a little of its own
in each loop."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig

KV_POLICIES = ("depth", "first")
# What each type of rotation needs beside its base. Of these the frequencies don't depend on the
# sequence's length, so a cached key stays what it was.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}

# Refused before anything of that size is built: far above any model, far under any overflow.
_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 13,
    "max_position_embeddings": 1 << 27,
    "block_layers": 1 << 10,
    "loops": 1 << 8,
}


class RecursiveConfig(PretrainedConfig):  # type: ignore[misc]
    """Configuration of ``RecursiveForCausalLM``.

    Attributes:
        block_layers: decoder layers in the tied block.
        loops: how often the block runs, R; at least 1.
        r_min: loops that every token runs, whatever an exit policy says; 1 to R.
        lora_rank: rank of what each loop adds to every projection of the block; 0 for nothing.
        kv_policy: whose keys and values a position attends to in loop r: "depth", those that loop r
            made; "first", those that loop 0 made. Trained in, so a property of the checkpoint.
        head_dim: of queries, keys and values; even. None for hidden_size / num_attention_heads.
        num_key_value_heads: a divisor of num_attention_heads; None for as many.
        sliding_window: positions a query sees, its own included; None for all before it.
        qkv_bias, o_bias, mlp_bias: which projections have a bias; each loop has its own.
        qk_norm: whether queries and keys are normalised per head, as in Qwen3.
        rope_parameters: as transformers has them; types "default", "linear", "llama3", "yarn".
        exit: how tokens leave early, as calibration stored it: {"policy", "threshold", "agreement",
            "confidence"}; None where nothing was calibrated.
        num_hidden_layers: layers of a key-value cache, one for each (plane, layer) pair, the layer
            running fastest: loops * block_layers for "depth", block_layers for "first". Derived.

    Raises:
        ValueError, TypeError: a field that is out of range.
    """

    model_type = "effinfer_recursive"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 352
    num_attention_heads: int = 4
    num_key_value_heads: Any = None  # these three are ints once __post_init__ has derived them
    head_dim: Any = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    block_layers: int = 2
    loops: int = 4
    r_min: int = 1
    lora_rank: int = 0
    kv_policy: str = "depth"
    exit: dict[str, Any] | None = None
    num_hidden_layers: Any = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name, limit in _LIMITS.items():
            if name != "head_dim":
                _whole(name, getattr(self, name), 1, limit)
        self._check_heads()
        self._check_loops()
        self._check_numbers()
        self._check_rope()
        self._check_exit()
        super().__post_init__(**kwargs)

    @property
    def kv_planes(self) -> int:
        """Keys and values kept for each layer of the block."""
        return self.loops if self.kv_policy == "depth" else 1

    def cache_layer(self, loop: int, layer: int) -> int:
        """Which layer of a cache holds what ``layer`` of the block attends to in ``loop``."""
        return (loop if self.kv_policy == "depth" else 0) * self.block_layers + layer

    def _check_heads(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "RecursiveConfig: num_key_value_heads must divide num_attention_heads "
                f"({self.num_attention_heads}), got {self.num_key_value_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    "RecursiveConfig: hidden_size must be a multiple of num_attention_heads "
                    f"({self.num_attention_heads}) where head_dim is not given, "
                    f"got {self.hidden_size}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        _whole("head_dim", self.head_dim, 2, _LIMITS["head_dim"])
        if self.head_dim % 2:
            raise ValueError(f"RecursiveConfig: head_dim must be even, got {self.head_dim}")
        if self.sliding_window is not None:
            _whole("sliding_window", self.sliding_window, 1, _LIMITS["max_position_embeddings"])

    def _check_loops(self) -> None:
        _whole("r_min", self.r_min, 1, self.loops)
        _whole("lora_rank", self.lora_rank, 0, _LIMITS["hidden_size"])
        if self.kv_policy not in KV_POLICIES:
            raise ValueError(
                f"RecursiveConfig: kv_policy must be one of {', '.join(KV_POLICIES)}, "
                f"got {self.kv_policy!r}"
            )
        cache_layers = self.kv_planes * self.block_layers
        if self.num_hidden_layers not in (None, cache_layers):
            raise ValueError(
                f"RecursiveConfig: num_hidden_layers must be {cache_layers}, the key-value planes "
                f"times block_layers, or left out, got {self.num_hidden_layers!r}"
            )
        self.num_hidden_layers = cache_layers

    def _check_numbers(self) -> None:
        if self.hidden_act != "silu":
            raise ValueError(f'RecursiveConfig: hidden_act must be "silu", got {self.hidden_act!r}')
        for name in ("rms_norm_eps", "initializer_range"):
            value = _finite(name, getattr(self, name))
            if not 0 < value < 1:
                raise ValueError(f"RecursiveConfig: {name} must be in (0, 1), got {value}")
        for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"RecursiveConfig: {name} must be a bool, got {getattr(self, name)!r}"
                )
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, self.vocab_size - 1)
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for end in ends:
            if end is not None:
                _whole("eos_token_id", end, 0, self.vocab_size - 1)

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        if rope is None:
            return  # transformers fills in its default
        if not isinstance(rope, dict):
            raise TypeError(f"RecursiveConfig: rope_parameters must be a dict, got {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            raise ValueError(
                f"RecursiveConfig: rope_type must be one of {', '.join(ROPE_TYPES)}, got {kind!r}"
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "RecursiveConfig: partial_rotary_factor must be 1, "
                f"got {rope['partial_rotary_factor']!r}"
            )
        for name in ("rope_theta", *ROPE_TYPES[kind]):
            if name != "rope_theta" and name not in rope:
                raise ValueError(
                    f"RecursiveConfig: rope_parameters must have {name!r} for {kind!r}"
                )
            value = _finite(f"rope_parameters[{name!r}]", rope.get(name, 1.0))
            if value <= 0:
                raise ValueError(
                    f"RecursiveConfig: rope_parameters[{name!r}] must be positive, got {value}"
                )

    def _check_exit(self) -> None:
        if self.exit is None:
            return
        if not isinstance(self.exit, dict):
            raise TypeError(f"RecursiveConfig: exit must be a dict or None, got {self.exit!r}")
        if not isinstance(self.exit.get("policy"), str):
            raise ValueError(
                f"RecursiveConfig: exit['policy'] must be a string, got {self.exit.get('policy')!r}"
            )
        for name in ("threshold", "agreement", "confidence"):
            if self.exit.get(name) is not None:
                _finite(f"exit[{name!r}]", self.exit[name])


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"RecursiveConfig: {name} must be an int, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"RecursiveConfig: {name} must be in {low} .. {high}, got {value}")


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"RecursiveConfig: {name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"RecursiveConfig: {name} must be finite, got {value}")
    return float(value)
