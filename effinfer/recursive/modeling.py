"""Recursive language models: the definition, in plain torch, with transformers' interface.

"Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA" (Bae et al.,
arXiv 2410.20672). A block of layers runs R times. Its projections are tied; each loop has its own
norms, biases and low-rank additions. Every loop can end in logits: norm_r, then the shared head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from effinfer.recursive.config import RecursiveConfig

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class RecursiveOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """What the model returns.

    Attributes:
        loop_logits: with ``output_loop_logits=True``, the logits (batch, kept positions, vocab) of
            every loop that ran; the last are ``logits``.
    """

    loop_logits: tuple[Tensor, ...] | None = None


def projection_shapes(config: RecursiveConfig) -> dict[str, tuple[int, int, bool]]:
    """Outputs, inputs and whether there is a bias, of every projection in a layer of the block."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (queries, hidden, config.qkv_bias),
        "k_proj": (keys, hidden, config.qkv_bias),
        "v_proj": (keys, hidden, config.qkv_bias),
        "o_proj": (hidden, queries, config.o_bias),
        "gate_proj": (inner, hidden, config.mlp_bias),
        "up_proj": (inner, hidden, config.mlp_bias),
        "down_proj": (hidden, inner, config.mlp_bias),
    }


class TiedLayer(nn.Module):
    """The projections of one layer of the block: the same in every loop, under Llama's names."""

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, (out_features, in_features, _) in projection_shapes(config).items():
            owner = self.self_attn if name in ATTENTION_PROJECTIONS else self.mlp
            owner.add_module(name, nn.Linear(in_features, out_features, bias=False))

    def projection(self, name: str) -> nn.Linear:
        """The tied projection called ``name``."""
        owner = self.self_attn if name in ATTENTION_PROJECTIONS else self.mlp
        return cast(nn.Linear, owner.get_submodule(name))


class LoopProjection(nn.Module):
    """What one loop adds to a tied projection: x -> B A x + bias.

    lora_A (rank, inputs), lora_B (outputs, rank) and bias (outputs) are None where the model has
    none.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, out_features: int, in_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        rank = min(rank, out_features, in_features)
        a = nn.Parameter(torch.empty(rank, in_features)) if rank else None
        b = nn.Parameter(torch.zeros(out_features, rank)) if rank else None
        self.register_parameter("lora_A", a)
        self.register_parameter("lora_B", b)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    def forward(self, tied: nn.Linear, x: Tensor) -> Tensor:
        """tied(x) + B A x + bias for x (..., inputs)."""
        if self.lora_A is None or self.lora_B is None:
            y: Tensor = tied(x)
        elif self.training:  # the same, and less work for the many rows of a training step
            y = F.linear(x, tied.weight + self.lora_B @ self.lora_A)
        else:
            y = tied(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)
        return y if self.bias is None else y + self.bias


class LoopLayer(nn.Module):
    """What one loop has of its own in one layer of the block: norms, and additions to projections.

    With kv_policy "first" only loop 0 makes keys and values: the others attend to those.
    """

    is_causal = True

    def __init__(self, config: RecursiveConfig, loop: int, index: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.layer_idx = config.cache_layer(loop, index)
        self.makes_kv = loop == 0 or config.kv_policy == "depth"
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.input_layernorm = LlamaRMSNorm(hidden, eps)
        self.post_attention_layernorm = LlamaRMSNorm(hidden, eps)
        self.q_norm = LlamaRMSNorm(config.head_dim, eps) if config.qk_norm else None
        self.k_norm = (
            LlamaRMSNorm(config.head_dim, eps) if config.qk_norm and self.makes_kv else None
        )
        for name, (out_features, in_features, bias) in projection_shapes(config).items():
            if self.makes_kv or name not in ("k_proj", "v_proj"):
                own = LoopProjection(out_features, in_features, config.lora_rank, bias)
                self.add_module(name, own)

    def forward(
        self,
        tied: TiedLayer,
        x: Tensor,
        kv: tuple[Tensor, Tensor] | None,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        **options: Any,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The layer on x (batch, T, hidden); ``kv`` is what loop 0 attended to in this layer.

        Returns the new x, and the keys and values attended to: those in the cache and x's own.
        """
        normed = self.input_layernorm(x)
        queries, keys = self._queries_keys(tied, normed, rotation)
        if keys is not None:
            kv = keys, self._by_head(self._project(tied, "v_proj", normed))
            if cache is not None:
                kv = cache.update(*kv, self.layer_idx)
        assert kv is not None, "loop 0 always makes keys and values"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, _ = attend(
            self,
            queries,
            *kv,
            mask,
            scaling=self.config.head_dim**-0.5,
            sliding_window=self.config.sliding_window,
            **options,
        )
        x = x + self._project(tied, "o_proj", attended.reshape(*x.shape[:-1], -1))
        return x + self._mlp(tied, self.post_attention_layernorm(x)), kv

    def _queries_keys(
        self, tied: TiedLayer, normed: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Rotated queries (batch, heads, T, head_dim), and keys if this loop makes them."""
        queries = self._by_head(self._project(tied, "q_proj", normed))
        queries = queries if self.q_norm is None else self.q_norm(queries)
        if not self.makes_kv:
            return apply_rotary_pos_emb(queries, queries, *rotation)[0], None
        keys = self._by_head(self._project(tied, "k_proj", normed))
        keys = keys if self.k_norm is None else self.k_norm(keys)
        rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb(queries, keys, *rotation)
        return rotated

    def _mlp(self, tied: TiedLayer, normed: Tensor) -> Tensor:
        gate = F.silu(self._project(tied, "gate_proj", normed))
        return self._project(tied, "down_proj", gate * self._project(tied, "up_proj", normed))

    def _project(self, tied: TiedLayer, name: str, x: Tensor) -> Tensor:
        return cast(Tensor, self.get_submodule(name)(tied.projection(name), x))

    def _by_head(self, x: Tensor) -> Tensor:
        """(batch, T, heads * head_dim) -> (batch, heads, T, head_dim)"""
        return x.view(*x.shape[:-1], -1, self.config.head_dim).transpose(1, 2)


class Loop(nn.Module):
    """All that one loop has of its own: a ``LoopLayer`` for each layer of the block, and the norm
    before the head."""

    def __init__(self, config: RecursiveConfig, index: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LoopLayer(config, index, j) for j in range(config.block_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)


class RecursivePreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What transformers has to know of these models."""

    config_class = RecursiveConfig
    base_model_prefix = "model"
    _no_split_modules = ("TiedLayer", "LoopLayer")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As transformers does; a loop's additions to the tied projections begin at zero."""
        super()._init_weights(module)
        if isinstance(module, LoopProjection):
            if module.lora_A is not None:
                init.normal_(module.lora_A, std=self.config.initializer_range)
                init.zeros_(module.lora_B)
            if module.bias is not None:
                init.zeros_(module.bias)


class RecursiveModel(RecursivePreTrainedModel):
    """Embedding, the tied block, and what each loop has of its own."""

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TiedLayer(config) for _ in range(config.block_layers))
        self.loops = nn.ModuleList(Loop(config, r) for r in range(config.loops))
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        num_loops: int | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Hidden states (batch, T, hidden) after each of the first ``num_loops`` loops, normalised
        for the head. Arguments are as in ``RecursiveForCausalLM``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("RecursiveModel: give input_ids or inputs_embeds, and not both")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + x.shape[1], device=x.device).unsqueeze(0)
        windowed = self.config.sliding_window is not None
        mask = (create_sliding_window_causal_mask if windowed else create_causal_mask)(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotation = self.rotary_emb(x, position_ids)
        kv: list[Any] = [None] * self.config.block_layers
        ends = []
        for r in range(self._checked_loops(num_loops)):
            loop = cast(Loop, self.loops[r])
            for j, own in enumerate(loop.layers):
                x, kv[j] = own(self.layers[j], x, kv[j], rotation, mask, past_key_values, **options)
            ends.append(loop.norm(x))
        return ends

    def _checked_loops(self, num_loops: int | None) -> int:
        loops: int = self.config.loops
        if num_loops is not None and not 1 <= num_loops <= loops:
            raise ValueError(f"RecursiveModel: num_loops must be in 1 .. {loops}, got {num_loops}")
        return loops if num_loops is None else num_loops


class RecursiveForCausalLM(RecursivePreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A recursive language model.

    Keys and values of loop r and layer j of the block lie in layer ``config.cache_layer(r, j)`` of
    an ordinary transformers cache, so ``generate`` and every cache class work.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__(config)
        self.model = RecursiveModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_loops: int | None = None,
        output_loop_logits: bool = False,
        **options: Any,
    ) -> RecursiveOutput:
        """Logits of input_ids (batch, T), or inputs_embeds (batch, T, hidden), after the last loop.

        Args:
            attention_mask: (batch, positions so far and T), 0 for padding.
            position_ids: (batch, T); None to count on from the cache.
            past_key_values: a cache to continue and extend.
            labels: (batch, T) tokens, -100 to ignore: adds the mean loss of predicting each from
                those before it.
            use_cache: make a cache where none is given; None for what the config says.
            logits_to_keep: how many of the last positions get logits, or a tensor of positions; 0
                for all.
            num_loops: run only the first so many; the same in every call on one cache.
            output_loop_logits: also return the logits of every loop that ran.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        ends = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            num_loops=num_loops,
            **options,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        wanted = ends if output_loop_logits else ends[-1:]
        loop_logits = tuple(self.lm_head(end[:, keep]) for end in wanted)
        logits = loop_logits[-1]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
        return RecursiveOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            loop_logits=loop_logits if output_loop_logits else None,
        )
