"""10^5 random operations: submissions, cancels, disconnects, deadlines, poison, in every mode. After
each, the scheduler's own invariants; at every token, the serial oracle."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.engine.driver import CANCELLED, ERROR, STOP, Driver, random_driver, random_request

SEEDS, OPERATIONS = 50, 2000


def random_ending(rng: random.Random, driver: Driver) -> None:
    """Somebody ends a request: one that runs, one that waits, or none that is known any more."""
    request = rng.choice(list(driver.live)) if driver.live and rng.random() < 0.9 else 10**9
    driver.end(request, rng.choice((CANCELLED, CANCELLED, STOP, ERROR)))


def operate(rng: random.Random, driver: Driver, kind: float) -> None:
    """One operation, chosen by a number in [0, 1)."""
    if kind < 0.15 and len(driver.live) < 12:
        random_request(rng, driver)
    elif kind < 0.18:
        random_ending(rng, driver)
    elif kind < 0.22:  # a client disconnects, or a row turns out poisoned, while the launch runs
        rows = driver.plan()
        random_ending(rng, driver)
        if rng.random() < 0.3:
            random_request(rng, driver)
        if rows:
            driver.commit(rows)
    else:
        driver.now += rng.random()
        driver.tick()
    driver.s.check()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_operations_keep_every_promise(seed: int) -> None:
    rng = random.Random(seed)
    driver = random_driver(rng)
    for _ in range(OPERATIONS):
        operate(rng, driver, rng.random())
    driver.drain()
    assert len(driver.ended) == driver.ids


class Machine(RuleBasedStateMachine):
    """The same operations as rules, for Hypothesis to find a short way to break a promise."""

    @initialize(seed=st.integers(0, 1 << 30))
    def start(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.driver = random_driver(self.rng)

    @rule()
    def submit(self) -> None:
        if len(self.driver.live) < 12:
            random_request(self.rng, self.driver)

    @rule()
    def end(self) -> None:
        random_ending(self.rng, self.driver)

    @rule(launches=st.integers(1, 20))
    def run(self, launches: int) -> None:
        for _ in range(launches):
            self.driver.now += 0.5
            self.driver.tick()

    @rule()
    def end_while_running(self) -> None:
        if rows := self.driver.plan():
            random_ending(self.rng, self.driver)
            self.driver.commit(rows)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "driver"):
            self.driver.s.check()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.drain()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
