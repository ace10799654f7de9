"""transformers' own looped model goes through effinfer's loading, and its cache is per loop."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, HrmTextConfig, HrmTextForCausalLM

from effinfer.engine.runner import make_runner
from effinfer.loading import load_model
from effinfer.models import demo_path


def small_config() -> HrmTextConfig:
    """Two stacks of two layers; two high cycles of two low ones."""
    return HrmTextConfig(
        **{"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8},
        **{"num_attention_heads": 4, "num_hidden_layers": 2, "H_cycles": 2, "L_cycles": 2},
    )


@torch.no_grad()
def test_loads_and_generates_as_one_forward(tmp_path: Path):
    torch.manual_seed(0)
    HrmTextForCausalLM(small_config()).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo_path()).save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    ids = tokenizer("The :mod:`json` module", return_tensors="pt").input_ids
    generated = model.generate(
        ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    whole = model(generated.sequences[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(generated.logits, 1), whole, atol=1e-4, rtol=1e-4)
    # a plane for each of the 2 x (2 + 1) runs of a stack of 2 layers
    assert len(generated.past_key_values.layers) == 12


def test_runs_in_the_engine():
    """Making the runner compares sequences in pieces with one forward, and refuses what differs."""
    torch.manual_seed(0)
    runner = make_runner(HrmTextForCausalLM(small_config()).eval())
    assert (runner.spec.loops, runner.spec.has_kv, runner.spec.has_state) == (1, True, False)
    # float32 keys and values of 4 heads of 8 in every one of the 12 planes
    assert runner.spec.bytes_per_block == runner.spec.block_size * 12 * 2 * 4 * 8 * 4
    runner.close()
