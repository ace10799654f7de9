"""Calibration: an exact test, thresholds in a fixed order, and a bound that holds."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
import torch

from effinfer.engine.calibrate import (
    binomial_tail,
    calibrate,
    choose_threshold,
    default_thresholds,
    exit_depths,
)
from effinfer.engine.policies import BY_NAME, from_config, gate
from effinfer.errors import UnsupportedModelError
from effinfer.recursive.config import RecursiveConfig
from effinfer.recursive.modeling import RecursiveForCausalLM


@pytest.mark.parametrize(("n", "rate"), [(1, 0.5), (10, 0.1), (60, 0.01), (200, 0.3)])
def test_the_binomial_tail_is_exact(n, rate):
    p = Fraction(rate)
    total = Fraction(0)
    for errors in range(n + 1):
        total += comb(n, errors) * p**errors * (1 - p) ** (n - errors)
        assert binomial_tail(errors, n, rate) == pytest.approx(float(total), rel=1e-9)


def test_the_binomial_tail_of_many_tokens():
    # From the normal approximation, with its correction for whole numbers.
    n, rate = 1_000_000, 0.01
    mean, sd = n * rate, (n * rate * (1 - rate)) ** 0.5
    assert binomial_tail(round(mean), n, rate) == pytest.approx(0.5, abs=0.01)
    assert binomial_tail(round(mean - 1.6449 * sd), n, rate) == pytest.approx(0.05, abs=0.001)


def test_exit_depths_are_the_first_sure_loop():
    scores = np.array([[0.9, 0.1, 0.1, 0.5], [0.1, 0.6, 0.1, 0.9], [0.0, 0.0, 0.0, 0.0]])
    assert exit_depths(scores, 0.5).tolist() == [1, 2, 3, 2]
    assert exit_depths(scores, 0.5, r_min=2).tolist() == [3, 2, 3, 2]
    assert exit_depths(scores, 0.5, r_min=3).tolist() == [3, 3, 3, 3]
    assert exit_depths(scores, 1.0).tolist() == [3, 3, 3, 3]


def world(n, rng):
    """Tokens whose first loop is right with probability = its score; full depth is right."""
    first = rng.random(n)
    scores = np.stack([first, np.ones(n)])
    right = np.stack([rng.random(n) < first, np.ones(n, dtype=bool)])
    return scores, right


def true_agreement(threshold):
    """Of ``world``: exits have a mean score half way between the threshold and 1."""
    return 1 - (1 - threshold) * (1 - (1 + threshold) / 2)


def test_the_bound_holds_as_often_as_it_says():
    thresholds = default_thresholds("margin", 0, 100)
    rng = np.random.default_rng(0)
    tries, agreement, confidence = 150, 0.95, 0.8
    found = [
        choose_threshold(*world(500, rng), thresholds, agreement=agreement, confidence=confidence)
        for _ in range(tries)
    ]
    broken = sum(true_agreement(t) < agreement for t in found)
    assert broken <= tries * (1 - confidence) + 3 * (tries * confidence * (1 - confidence)) ** 0.5
    assert broken > 0.02 * tries  # and it isn't met by never exiting
    assert np.median(found) < 0.85  # the best there is: 0.684


def test_testing_stops_at_the_first_threshold_that_fails():
    scores = np.stack([np.repeat([0.9, 0.6, 0.3], 400), np.ones(1200)])
    right = np.ones((2, 1200), dtype=bool)
    right[0, 400:800] = False  # at 0.5 a third disagrees, and a lower threshold changes nothing
    assert choose_threshold(scores, right, [1.0, 0.8, 0.5, 0.2], agreement=0.9) == 0.8
    right[0] = True
    assert choose_threshold(scores, right, [1.0, 0.8, 0.5, 0.2], agreement=0.9) == 0.2


def test_too_few_tokens_say_how_many_it_takes():
    scores, right = np.zeros((2, 298)), np.ones((2, 298), dtype=bool)
    with pytest.raises(ValueError, match=r"on 298 tokens; it takes 299 tokens"):
        choose_threshold(scores, right, [1.0], agreement=0.99, confidence=0.95)
    scores, right = np.zeros((2, 299)), np.ones((2, 299), dtype=bool)
    assert choose_threshold(scores, right, [1.0], agreement=0.99, confidence=0.95) == 1.0


@pytest.mark.parametrize("policy", BY_NAME)
def test_default_thresholds_begin_where_nothing_exits(policy):
    thresholds = default_thresholds(policy, 1000)
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] == (0.0 if policy == "entropy" else 1.0)
    assert 200 <= len(thresholds) <= 202


def tiny_recursive(loops=3):
    torch.manual_seed(0)
    config = RecursiveConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        block_layers=1,
        loops=loops,
        lora_rank=2,
        initializer_range=0.3,
    )
    return RecursiveForCausalLM(config).eval()


@pytest.mark.parametrize("policy", BY_NAME)
def test_a_model_is_calibrated_as_its_loops_say(policy, capsys):
    model = tiny_recursive()
    ids = torch.randint(0, 40, (6, 100), generator=torch.Generator().manual_seed(1))
    result = calibrate(model, [ids[:2], *ids[2:]], policy=policy, agreement=0.6, confidence=0.9)

    found = from_config(model.config.exit)
    assert isinstance(found, BY_NAME[policy])
    assert found.threshold == result.threshold
    assert model.config.exit["agreement"] == 0.6
    assert f"{policy} > " in capsys.readouterr().out

    # By hand: every position's loops judged one after the other, with the found threshold.
    with torch.inference_mode():
        logits = model(input_ids=ids, output_loop_logits=True).loop_logits
        hidden = []
        hooks = [
            loop.norm.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
            for loop in model.model.loops
        ]
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    tops = [x.argmax(-1) for x in logits]
    depth = torch.full(ids.shape, 3)
    for loop in (1, 0):
        p = logits[loop].softmax(-1)
        two = p.topk(2).values
        score = {
            "margin": two[..., 0] - two[..., 1],
            "stable_margin": two[..., 0] - two[..., 1],
            "max_prob": two[..., 0],
            "entropy": (p * p.log()).sum(-1),
            "cosine": torch.nn.functional.cosine_similarity(hidden[loop], hidden[loop - 1], dim=-1),
        }[policy]
        sure = score > result.threshold
        if policy in ("stable_margin", "cosine"):
            sure &= torch.tensor(loop > 0)
        if policy == "stable_margin":
            sure &= tops[loop] == tops[loop - 1]
        depth[sure] = loop + 1
    chosen = torch.stack(tops).gather(0, depth[None] - 1)[0]
    assert result.tokens == ids.numel()
    assert abs(result.disagreements - int((chosen != tops[2]).sum())) <= 1  # f32 at the threshold
    assert result.depth == pytest.approx(depth.float().mean().item(), abs=0.01)
    assert result.disagreements <= 0.4 * ids.numel()


def test_a_gate_is_calibrated_and_not_stored():
    model = tiny_recursive()
    ids = torch.randint(0, 40, (4, 100), generator=torch.Generator().manual_seed(1))
    result = calibrate(
        model, ids, policy=gate(torch.nn.Linear(32, 1), 0.5), agreement=0.5, verbose=False
    )
    assert result.policy == "gate"
    assert model.config.exit is None


def test_what_cannot_be_calibrated_is_refused():
    model = tiny_recursive()
    with pytest.raises(ValueError, match=r"calibrate: agreement must be in \(0, 1\), got 1"):
        calibrate(model, [[1, 2]], agreement=1)
    with pytest.raises(ValueError, match="calibrate: policy must be a gate or one of"):
        calibrate(model, [[1, 2]], policy="luck")
    with pytest.raises(ValueError, match="calibrate: data holds texts; pass tokenizer="):
        calibrate(model, "text")
    with pytest.raises(ValueError, match="calibrate: data is empty"):
        calibrate(model, [])
    with pytest.raises(UnsupportedModelError, match="Linear has no loops"):
        calibrate(torch.nn.Linear(1, 1), [[1]])
