"""Scale folds: equal in float64 where they are exact, refused with a reason where they are not."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from effinfer import fold
from effinfer.fold import Pair

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
BATCH = {"input_ids": IDS}


class RMSNorm64(nn.Module):
    """Llama's and Mamba's norms compute in float32 whatever they are given; this one does not."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def randomized(model: nn.Module) -> nn.Module:
    """Float64, with every parameter away from its ones and zeros, and true float64 norms."""
    torch.manual_seed(1)
    for name, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            model.set_submodule(name, RMSNorm64(module))
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.rand_like(parameter) + 0.5
            parameter.copy_(spread if parameter.dim() == 1 else parameter * 8 * spread)
    return model.double().eval()


def llama() -> nn.Module:
    return randomized(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2,
            )
        )
    )  # fmt: skip


def bert() -> nn.Module:
    return randomized(
        BertModel(
            BertConfig(
                vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4,
            )
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    return randomized(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4)))


def mamba() -> nn.Module:
    return randomized(
        MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2))
    )


FAMILIES = {"llama": llama, "bert": bert, "gpt2": gpt2, "mamba": mamba}


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return model(**BATCH)[0]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smooth_is_exact_and_moves_scales(family: str, alpha: float) -> None:
    model = FAMILIES[family]()
    stock = copy.deepcopy(model.state_dict())
    before = outputs(model)
    report = fold.smooth(model, [BATCH], alpha=alpha)
    assert report.folded
    assert difference(outputs(model), before) <= 1e-12
    for part in report.folded:
        for name in (part.source, *part.targets):
            assert not torch.equal(model.state_dict()[f"{name}.weight"], stock[f"{name}.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_powers_of_two_keep_every_bit(family: str) -> None:
    model = FAMILIES[family]().float()
    before = outputs(model)
    assert fold.smooth(model, [BATCH], power_of_two=True).folded
    assert torch.equal(outputs(model), before)


def test_smoothing_levels_the_activations() -> None:
    """With alpha 1 every input of the targets has the same largest value: one."""
    model = llama()
    fold.smooth(model, [BATCH], alpha=1.0)
    seen = []
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().amax((0, 1))))
    outputs(model)
    torch.testing.assert_close(seen[0], torch.ones_like(seen[0]))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=16, max_size=16), st.integers(0, 3))
def test_any_positive_scale_is_exact(scale: list[float], which: int) -> None:
    """Through grouped heads (16 channels of v, read by 32 inputs of o) and norms alike."""
    model = llama()
    pairs = fold.find_pairs(model)
    before = outputs(model)
    pair = pairs[which]
    width = len(model.get_submodule(pair.source).weight)
    fold.move_scale(model, pair, torch.tensor(scale).repeat(-(-width // 16))[:width])
    assert difference(outputs(model), before) <= 1e-12


def test_grouped_heads_are_found() -> None:
    pair = next(p for p in fold.find_pairs(llama()) if p.source.endswith("v_proj"))
    assert (pair.repeat, pair.head_dim) == (2, 8)


def test_bert_norms_are_refused_and_its_values_folded() -> None:
    report = fold.smooth(bert(), [BATCH])
    assert {f.source.rpartition(".")[2] for f in report.folded} == {"value"}
    assert {r.source.rpartition(".")[2] for r in report.refused} == {"LayerNorm"}
    assert all("something else reads it" in r.reasons[0] for r in report.refused)
    assert "something else reads it" in str(report)


def refusal(model: nn.Module, pair: Pair) -> str:
    """The reasons; and the model must be as it was."""
    before = copy.deepcopy(model.state_dict())
    (refused,) = fold.smooth(model, [BATCH], pairs=[pair]).refused
    scale = torch.full_like(model.get_submodule(pair.source).weight[..., 0:1].flatten(), 3)
    with pytest.raises(ValueError, match=r"cannot be scaled|scale must be"):
        fold.move_scale(model, pair, scale, batch=BATCH)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return "; ".join(refused.reasons)


def test_a_nonlinearity_between_is_refused() -> None:
    layer = "model.layers.0.mlp"
    reasons = refusal(llama(), Pair(f"{layer}.gate_proj", (f"{layer}.down_proj",)))
    assert "not linear in it" in reasons


def test_a_forgotten_reader_is_refused() -> None:
    layer = "model.layers.1"
    pair = Pair(
        f"{layer}.input_layernorm", (f"{layer}.self_attn.q_proj", f"{layer}.self_attn.k_proj")
    )
    assert "something else reads it" in refusal(llama(), pair)


def test_tied_weights_are_refused() -> None:
    model = gpt2()
    assert "lm_head.weight is tied" in refusal(model, Pair("transformer.ln_f", ("lm_head",)))


def test_a_layer_used_twice_is_refused() -> None:
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    pair = fold.find_pairs(model)[0]
    assert "is also model.layers.1" in refusal(model, pair)


def test_a_unit_offset_norm_is_refused() -> None:
    class UnitOffset(RMSNorm64):
        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    model = llama()
    name = "model.layers.0.input_layernorm"
    model.get_submodule(name).variance_epsilon = 1e-6
    model.set_submodule(name, UnitOffset(model.get_submodule(name)))
    pair = next(p for p in fold.find_pairs(model) if p.source == name)
    assert "not proportional to its weight" in refusal(model, pair)


def test_a_subclassed_linear_is_refused() -> None:
    class Doubling(nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    model = llama()
    model.model.layers[0].mlp.up_proj.__class__ = Doubling
    layer = "model.layers.0"
    pair = Pair(
        f"{layer}.post_attention_layernorm", (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
    )
    assert "is not a plain linear" in refusal(model, pair)


def test_wrong_widths_are_refused() -> None:
    pair = Pair("model.layers.0.input_layernorm", ("model.layers.0.mlp.down_proj",))
    assert "reads 48 channels" in refusal(llama(), pair)


def test_an_error_half_way_restores_the_model() -> None:
    """The second pair's weights overflow float16; the first pair's are put back."""
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[2].bias.fill_(3e4)
        model[3].weight.copy_(torch.tensor([10.0, -10.0, 10.0, -10.0]).expand(4, 4))
    model.half()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 4).half()
    with pytest.raises(ValueError, match="does not fit in torch"):
        fold.smooth(model, [x], alpha=1.0, pairs=[Pair("0", ("1",)), Pair("2", ("3",))])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: fold.smooth(model, []), "at least one batch"),
        (lambda model: fold.smooth(model, [BATCH], alpha=1.5), "alpha must be from 0 to 1"),
        (lambda model: fold.smooth(model.train(), [BATCH]), "eval mode"),
        (
            lambda model: fold.move_scale(model, fold.find_pairs(model)[0], torch.zeros(32)),
            "32 positive finite numbers",
        ),
    ],
)
def test_bad_arguments(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change(llama())
