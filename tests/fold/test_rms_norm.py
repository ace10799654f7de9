"""Pre-LN to Pre-RMSNorm: equal in float64, all or nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from effinfer import fold
from effinfer.fold import BiasedRMSNorm, ResidualStream
from tests.fold.test_scale import bert, difference, gpt2, outputs, randomized


def gpt_neox() -> nn.Module:
    return randomized(
        GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4,
            )
        )
    )  # fmt: skip


def opt() -> nn.Module:
    return randomized(
        OPTForCausalLM(
            OPTConfig(
                vocab_size=32, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
                num_hidden_layers=2, num_attention_heads=4,
            )
        )
    )  # fmt: skip


@pytest.mark.parametrize("family", [gpt_neox, gpt2, opt])
def test_equal_in_float64(family) -> None:
    model = family()
    before = outputs(model)
    report = fold.to_rms_norm(model, untie=True)
    assert len(report.folded) == 5
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert difference(outputs(model), before) <= 1e-12
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_types_round_only(dtype: torch.dtype) -> None:
    model = gpt_neox().to(dtype)
    before = outputs(model).double()
    assert fold.to_rms_norm(model).folded
    assert difference(outputs(model).double(), before) <= 64 * torch.finfo(dtype).eps


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_tied_embeddings_are_refused() -> None:
    model = gpt2()
    before = copy.deepcopy(model.state_dict())
    (refused,) = fold.to_rms_norm(model).refused
    assert "transformer.wte.weight is tied" in refused.reasons[0]
    assert unchanged(model, before)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_forgotten_writer_is_found_and_all_is_put_back() -> None:
    model = gpt2()
    before, tied = copy.deepcopy(model.state_dict()), model.lm_head.weight
    stream = fold.find_stream(model)
    fewer = ResidualStream(tuple(w for w in stream.writers if not w.endswith("wpe")), stream.norms)
    (refused,) = fold.to_rms_norm(model, fewer, untie=True).refused
    assert "not all writers are known" in refused.reasons[0]
    assert unchanged(model, before)
    assert model.lm_head.weight is tied is model.transformer.wte.weight
    assert not any(isinstance(m, BiasedRMSNorm) for m in model.modules())


def test_another_reader_is_found() -> None:
    class Readout(nn.Module):
        """A stream read by a norm, and as it is."""

        def __init__(self) -> None:
            super().__init__()
            self.write, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            stream = self.write(x)
            return stream + self.norm(stream)

    torch.manual_seed(0)
    model = Readout().eval()
    (refused,) = fold.to_rms_norm(
        model, ResidualStream(("write",), ("norm",)), batch=torch.randn(4, 8)
    ).refused
    assert "something else reads the residual stream" in refused.reasons[0]


def test_an_unknown_family_needs_a_stream() -> None:
    with pytest.raises(ValueError, match="no Pre-LN family"):
        fold.to_rms_norm(bert())
