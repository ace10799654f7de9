"""The engine over a toy model: the serial tokens whatever is mixed, and each end by itself."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from effinfer.engine import policies
from effinfer.engine.engine import EngineClosed, QueueFull
from effinfer.engine.params import SamplingParams
from effinfer.engine.sampling import RowParams, sample
from effinfer.engine.submission import RequestTooLong
from tests.engine.toy import (
    POISON,
    VOCAB,
    Letters,
    ToyRunner,
    make,
    prompt_of,
    serial,
    toy_logits,
)

REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 14),  # prompt length
        st.integers(1, 12),  # tokens
        st.sampled_from([0.0, 0.7, 1.5]),
        st.sampled_from([1.0, 1.5]),  # repetition penalty
    ),
    min_size=1,
    max_size=9,
)


def params_of(seed, tokens, temperature, penalty):
    return SamplingParams(
        max_tokens=tokens,
        temperature=temperature,
        top_p=0.95,
        seed=seed,
        repetition_penalty=penalty,
    )


@given(requests=REQUESTS, budget=st.integers(1, 20), mode=st.sampled_from(["full", "ngram"]))
@settings(max_examples=25, deadline=None)
def test_tokens_are_the_serial_ones_whatever_is_mixed(requests, budget, mode):
    options = {"max_ngram": 3} if mode == "ngram" else {}
    with make(token_budget=budget, **options) as engine:
        prompts = [prompt_of(i % 3, length) for i, (length, *_) in enumerate(requests)]
        params = [params_of(i, *rest) for i, (_, *rest) in enumerate(requests)]
        outputs = engine.generate(prompts, params)
        for prompt, one, output in zip(prompts, params, outputs, strict=True):
            assert output.tokens == serial(prompt, one)[0]
            assert output.finish_reason == "length"
            assert output.depths == [1] * one.max_tokens
        assert engine.runner.widest <= budget


@given(
    requests=REQUESTS,
    threshold=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    mode=st.sampled_from(["exit", "lossless", "full"]),
)
@settings(max_examples=30, deadline=None)
def test_loops_exits_and_drafts_give_the_serial_tokens(requests, threshold, mode):
    policy = None if mode == "full" else policies.margin(threshold)
    with make(3, mode=mode, policy=policy) as engine:
        prompts = [prompt_of(i % 3, length) for i, (length, *_) in enumerate(requests)]
        params = [params_of(i, *rest) for i, (_, *rest) in enumerate(requests)]
        for prompt, one, output in zip(
            prompts, params, engine.generate(prompts, params), strict=True
        ):
            want, depths = serial(
                prompt, one, loops=3, policy=threshold if mode == "exit" else None
            )
            assert output.tokens == want
            assert output.depths == (depths if mode == "exit" else [3] * len(want))


def test_a_stop_token_is_the_last_and_not_in_the_text():
    prompt = prompt_of(0, 5)
    want = serial(prompt, SamplingParams(max_tokens=20))[0]
    stop = want[7]
    params = SamplingParams(max_tokens=20, stop_token_ids=[stop])
    with make(tokenizer=Letters()) as engine:
        output = engine.generate([prompt], params)[0]
    first = want.index(stop)
    assert output.tokens == want[: first + 1]
    assert output.text == Letters().decode(want[:first])
    assert output.finish_reason == "stop"


def test_the_models_own_stop_tokens_can_be_ignored():
    prompt = prompt_of(0, 5)
    want = serial(prompt, SamplingParams(max_tokens=20))[0]
    with make(eos_token_ids=[want[4]]) as engine:
        stopped, ignored = engine.generate(
            [prompt] * 2,
            [SamplingParams(max_tokens=20), SamplingParams(max_tokens=20, ignore_eos=True)],
        )
    assert stopped.tokens == want[: want.index(want[4]) + 1]
    assert ignored.tokens == want


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_stop_string_ends_the_request_and_its_text(width):
    prompt = prompt_of(1, 6)
    want = serial(prompt, SamplingParams(max_tokens=16))[0]
    text = Letters().decode(want)
    stop = text[5 : 5 + width]
    at = text.index(stop)
    params = SamplingParams(max_tokens=16, stop=[stop, "nothing like it"])
    with make(tokenizer=Letters()) as engine:
        handle = engine.submit(prompt, params)
        assert "".join(handle.texts()) == text[:at]
        output = handle.result()
        assert engine.stats()["running"] == 0
    assert output.text == text[:at]
    assert output.tokens == want[: at + width]
    assert output.finish_reason == "stop"


def test_a_stop_string_in_the_very_last_token_is_a_stop():
    prompt = prompt_of(1, 6)
    want = serial(prompt, SamplingParams(max_tokens=4))[0]
    stop = Letters().decode(want[-1:])
    assert want.index(want[-1]) == 3
    with make(tokenizer=Letters()) as engine:
        output = engine.generate([prompt], SamplingParams(max_tokens=4, stop=stop))[0]
    assert (output.finish_reason, output.tokens) == ("stop", want)


def test_min_tokens_hold_stops_back():
    prompt = prompt_of(0, 5)
    want = serial(prompt, SamplingParams(max_tokens=12))[0]
    with make(tokenizer=Letters()) as engine:
        by_string, by_token = engine.generate(
            [prompt] * 2,
            [
                SamplingParams(max_tokens=12, stop=Letters().decode(want[1:2]), min_tokens=6),
                SamplingParams(max_tokens=12, stop_token_ids=want[1:2], min_tokens=6),
            ],
        )
    assert len(by_string.tokens) >= 6
    assert by_string.tokens == want[: len(by_string.tokens)]
    assert want[1] not in by_token.tokens[:6]


@pytest.mark.parametrize("loops", [1, 3])
def test_logprobs_are_those_of_the_tokens(loops):
    mode = {"mode": "lossless", "policy": policies.margin(0.2)} if loops > 1 else {"max_ngram": 3}
    prompts = [prompt_of(i, 4 + i) for i in range(5)]
    params = SamplingParams(max_tokens=9, temperature=0.8, seed=3, logprobs=2)
    with make(loops, **mode) as engine:
        for prompt, output in zip(prompts, engine.generate(prompts, params), strict=True):
            assert len(output.logprobs) == 9
            sequence = list(prompt)
            for token, entry in zip(output.tokens, output.logprobs, strict=True):
                want = toy_logits(sequence, loops - 1, loops).log_softmax(-1)
                assert entry.logprob == pytest.approx(want[token].item(), abs=1e-5)
                assert [t for t, _ in entry.top] == want.topk(2).indices.tolist()
                sequence.append(token)


def test_cancel_ends_one_request_queued_or_running_and_no_other():
    with make(max_slots=2) as engine:
        handles = [engine.submit(prompt_of(i, 6), SamplingParams(max_tokens=10)) for i in range(6)]
        for _ in range(3):
            engine.step()
        handles[0].cancel()  # running
        handles[4].cancel()  # queued
        engine.step()
        assert [handles[i].finish_reason for i in (0, 4)] == ["cancelled", "cancelled"]
        assert handles[4].result().tokens == []
        for i in (1, 2, 3, 5):
            output = handles[i].result()
            assert output.tokens == serial(prompt_of(i, 6), SamplingParams(max_tokens=10))[0]
        handles[0].cancel()  # again, and too late: nothing
        assert engine.stats()["finished"]["cancelled"] == 2


def test_a_deadline_ends_a_request_with_what_it_has():
    with make() as engine:
        late = engine.submit(prompt_of(0, 4), SamplingParams(max_tokens=10), deadline=0.0)
        never = engine.submit(prompt_of(1, 4), SamplingParams(max_tokens=10), deadline=1e9)
        assert late.result().finish_reason == "deadline"
        assert never.result().finish_reason == "length"


def test_a_poisoned_request_fails_alone():
    good = prompt_of(0, 6)
    with make(3, mode="exit", policy=policies.stable_margin(0.1)) as engine:
        handles = [
            engine.submit([*good[:3], POISON] if i == 1 else good, SamplingParams(max_tokens=8))
            for i in range(3)
        ]
        bad = handles[1].result()
        assert bad.finish_reason == "error"
        assert "NaN" in bad.error
        for handle in (handles[0], handles[2]):
            assert handle.result().finish_reason == "length"
        assert handles[0].tokens == handles[2].tokens


def test_a_sampler_that_raises_fails_its_request_alone(monkeypatch):
    from effinfer.engine import sampling

    def faulty(logits, rows, *rest):
        if any(row.params.top_k == 13 for row in rows):
            raise ZeroDivisionError("thirteen")
        return sample(logits, rows, *rest)

    sample = sampling.sample
    params = [SamplingParams(max_tokens=6, temperature=1.0, seed=i, top_k=12 + i) for i in range(3)]
    prompts = [prompt_of(i, 5) for i in range(3)]
    monkeypatch.setattr(sampling, "sample", faulty)
    with make() as engine:
        outputs = engine.generate(prompts, params)
    monkeypatch.undo()
    assert [o.finish_reason for o in outputs] == ["length", "error", "length"]
    assert "ZeroDivisionError: thirteen" in outputs[1].error
    for i in (0, 2):
        assert outputs[i].tokens == serial(prompts[i], params[i])[0]


def test_a_model_that_raises_ends_every_request_and_the_engine():
    engine = make()
    handles = [engine.submit(prompt_of(i, 5), SamplingParams(max_tokens=5)) for i in range(7)]
    engine.step()
    engine.runner.explode = True
    with pytest.raises(RuntimeError, match="boom"):
        engine.step()
    for handle in handles:
        output = handle.result()
        assert output.finish_reason == "error"
        assert "RuntimeError: boom" in output.error
    with pytest.raises(EngineClosed, match="boom"):
        engine.submit([1, 2])
    assert not engine.step()
    engine.close()
    assert engine.runner.closed


def test_a_full_queue_refuses_and_takes_again():
    with make(max_slots=2, max_queue=3) as engine:
        handles = [engine.submit(prompt_of(i, 3)) for i in range(5)]
        with pytest.raises(QueueFull, match="3 requests are waiting"):
            engine.submit(prompt_of(9, 3))
        handles[0].result()
        engine.submit(prompt_of(9, 3)).result()
        assert engine.stats()["rejected"] == 1


def test_what_never_fits_is_refused_at_once():
    with make() as engine:
        with pytest.raises(RequestTooLong, match="at most 64 together, got 60 and 5"):
            engine.submit([1] * 60, SamplingParams(max_tokens=5))
        assert len(engine.submit([1] * 60, SamplingParams(max_tokens=4)).result().tokens) == 4
    with make(memory_bytes=500) as engine:  # five blocks of four
        with pytest.raises(RequestTooLong, match="at most 21 together"):
            engine.submit([1] * 20, SamplingParams(max_tokens=2))
        assert len(engine.submit([1] * 20, SamplingParams(max_tokens=1)).result().tokens) == 1


BAD_SUBMISSIONS = [
    ({"ids": []}, ValueError, "ids must hold one token or more"),
    ({"ids": [[1, 2], [3, 4]]}, ValueError, "ids must be a list of tokens"),
    ({"ids": [0.5]}, TypeError, "ids must be integers"),
    ({"ids": [VOCAB]}, ValueError, f"ids must be in 0 .. {VOCAB - 1}, got {VOCAB} .. {VOCAB}"),
    ({"ids": [-1]}, ValueError, "ids must be in 0"),
    ({"ids": "text"}, ValueError, "a text needs an engine with a tokenizer"),
    ({"params": {"max_tokens": 3}}, TypeError, "params must be SamplingParams"),
    ({"params": SamplingParams(stop="x")}, ValueError, "stop needs an engine with a tokenizer"),
    ({"params": SamplingParams(stop_token_ids=[99])}, ValueError, "stop_token_ids must be below"),
    ({"deadline": -1}, ValueError, "deadline must be 0 or more"),
    ({"deadline": float("nan")}, ValueError, "deadline must be 0 or more"),
    ({"deadline": "soon"}, TypeError, "deadline must be seconds"),
    ({"priority": 0.5}, ValueError, "priority must be an int"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_SUBMISSIONS)
def test_a_bad_submission_is_refused_and_leaves_nothing(arguments, error, message):
    with make() as engine:
        with pytest.raises(error, match=message):
            engine.submit(**{"ids": [1, 2], **arguments})
        assert not engine.step()
        assert engine.stats()["requests"] == 0


BAD_ENGINES = [
    ({"max_slots": 0}, ValueError, "max_slots must be 1 or more"),
    ({"token_budget": 2.0}, TypeError, "token_budget must be an int"),
    ({"mode": "fast"}, ValueError, "mode must be one of full, exit, lossless"),
    ({"mode": "exit"}, ValueError, "mode 'exit' needs a model with loops"),
    ({"policy": policies.margin(0.5)}, ValueError, "a policy needs mode"),
    ({"policy": 3, "mode": "exit"}, TypeError, "policy must be an exit policy"),
    ({"costs": [1.0]}, ValueError, "costs must have token_budget = 12 entries, got 1"),
    ({"max_queue": -1}, ValueError, "max_queue must be 0 or more"),
    ({"memory_bytes": 99}, ValueError, "memory_bytes must be at least 100"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_ENGINES)
def test_a_bad_engine_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_exit_needs_a_policy():
    with pytest.raises(ValueError, match="mode 'exit' needs a policy"):
        make(3, mode="exit")


def test_prompts_may_be_tensors_arrays_and_texts():
    with make(tokenizer=Letters()) as engine:
        same = [[1, 2, 3], torch.tensor([[1, 2, 3]]), np.array([1, 2, 3], np.int16), "BCD"]
        outputs = engine.generate(same)
        assert all(o.tokens == outputs[0].tokens for o in outputs)
        assert outputs[0].text == Letters().decode(outputs[0].tokens)


def test_generate_feeds_a_small_queue_and_shows_a_bar(capsys):
    prompts = [prompt_of(i, 3) for i in range(9)]
    with make(max_slots=2, max_queue=0) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=3), progress=True)
        assert [o.tokens for o in outputs] == [
            serial(p, SamplingParams(max_tokens=3))[0] for p in prompts
        ]
        assert engine.stats()["rejected"] == 0
    assert "27 tokens" in capsys.readouterr().out


def test_generate_wants_as_many_params_as_prompts():
    with make() as engine, pytest.raises(ValueError, match="params must be one or 2, got 3"):
        engine.generate([[1], [2]], [SamplingParams()] * 3)


def test_stats_add_up_and_nothing_is_left_after_a_drain():
    with make() as engine:
        handles = [engine.submit(prompt_of(i, 6), SamplingParams(max_tokens=7)) for i in range(8)]
        engine.drain()
        assert all(handle.finish_reason == "length" for handle in handles)
        with pytest.raises(EngineClosed, match="drains"):
            engine.submit([1])
        stats = engine.stats()
        assert stats["tokens"] == 8 * 7
        assert stats["prompt_tokens"] == 8 * 6
        assert stats["finished"]["length"] == 8
        assert stats["running"] == stats["waiting"] == 0
        assert stats["rows"] == stats["prefill_rows"] + stats["decode_rows"]
        assert stats["rows_per_launch"] == pytest.approx(stats["rows"] / stats["launches"])
        assert stats["launch_seconds"] + stats["choose_seconds"] <= stats["step_seconds"]
        engine._scheduler.check()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_early_exits_are_held_against_full_depth(temperature):
    prompt, loops = prompt_of(0, 6), 3
    params = SamplingParams(max_tokens=700, temperature=temperature, seed=1)
    with make(runner=ToyRunner(loops, max_positions=1024), mode="exit",
              policy=policies.margin(0.05)) as engine:  # fmt: skip
        output = engine.generate([prompt], params)[0]
        stats = engine.stats()
    early = [at for at, depth in enumerate(output.depths) if depth < loops]
    sampled = early[63::64]
    row = RowParams(params, 1, len(prompt), ())
    agreed = 0
    for at in sampled:
        known = np.array(prompt + output.tokens[:at], dtype=np.int32)
        logits = toy_logits(known.tolist(), loops - 1, loops)[None]
        token = sample(logits, [row], np.array([len(known) - 1]), lambda _, h=known: h)[0]
        agreed += int(token) == output.tokens[at]
    assert (stats["exits_checked"], stats["exits_agreed"]) == (len(sampled), agreed)
    assert 0 < agreed < len(sampled)


def test_slots_tell_what_runs():
    with make(3, mode="exit", policy=policies.margin(0.0), max_slots=2) as engine:
        handles = [engine.submit(prompt_of(i, 9), SamplingParams(max_tokens=9)) for i in range(3)]
        assert engine.stats()["slots"] == []
        engine.step()
        assert [slot["kind"] for slot in engine.stats()["slots"]] == ["prefill", "prefill"]
        while not handles[0].tokens:
            engine.step()
        slot = engine.stats()["slots"][0]
        loops = slot.pop("loops")
        assert loops
        assert set(loops) <= {0, 1, 2}
        assert slot == {
            "request": handles[0].request_id,
            "kind": "decode",
            "prompt_tokens": 9,
            "tokens": 1,
            "max_tokens": 9,
            "depth": 1,
        }
        assert not engine.broken
    assert engine.broken


def test_close_cancels_what_runs_and_closes_the_runner():
    engine = make()
    handles = [engine.submit(prompt_of(i, 5)) for i in range(6)]
    engine.step()
    engine.close()
    engine.close()
    assert [h.result().finish_reason for h in handles] == ["cancelled"] * 6
    assert engine.runner.closed
    assert not engine.step()
    with pytest.raises(EngineClosed, match="closed"):
        engine.submit([1])
