"""Calibration: an exact test, thresholds in a fixed order, and a bound that holds."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from effinfer.engine.calibrate import (
    binomial_tail,
    choose_threshold,
    default_thresholds,
    exit_depths,
)
from effinfer.engine.policies import BY_NAME


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
    tries, agreement, confidence = 400, 0.95, 0.8
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
