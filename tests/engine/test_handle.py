"""Handles from several threads and from asyncio, with and without the engine's own thread."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from effinfer.engine.engine import Engine, EngineClosed
from effinfer.engine.params import SamplingParams
from tests.engine.toy import POISON, Letters, ToyRunner, serial

LENGTH = SamplingParams(max_tokens=12)


def make(**options):
    return Engine(ToyRunner(), **{"max_slots": 4, "token_budget": 12, **options})


def prompt_of(seed):
    return np.random.default_rng(seed).integers(0, POISON, 5).tolist()


def test_iterating_runs_the_engine_and_may_be_repeated():
    with make() as engine:
        handle = engine.submit(prompt_of(0), LENGTH)
        stream = iter(handle)
        first = next(stream)
        assert handle.finish_reason is None  # nothing ran ahead of the reader
        assert len(handle.tokens) == 1
        rest = list(stream)
        assert [first, *rest] == list(handle) == handle.result().tokens
        assert handle.result() is handle.result()
        timings = handle.result().timings
        assert 0 <= timings.first_token <= timings.total


def test_many_threads_submit_and_stream_from_one_engine_thread():
    got: dict[int, list[int]] = {}

    def client(i):
        got[i] = list(engine.submit(prompt_of(i), LENGTH))

    with make() as engine:
        engine.run_in_thread()
        engine.run_in_thread()  # once is enough
        threads = [threading.Thread(target=client, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == {i: serial(prompt_of(i), LENGTH)[0] for i in range(12)}


def test_several_readers_of_one_handle_get_every_token():
    got = []
    with make() as engine:
        handle = engine.submit(prompt_of(0), LENGTH)
        threads = [threading.Thread(target=lambda: got.append(list(handle))) for _ in range(4)]
        for thread in threads:
            thread.start()
        engine.run_in_thread()
        for thread in threads:
            thread.join()
    assert got == [serial(prompt_of(0), LENGTH)[0]] * 4


def test_result_gives_up_waiting_and_the_request_runs_on():
    with make() as engine:
        engine._thread = threading.Thread()  # an engine thread that never runs
        handle = engine.submit(prompt_of(0), LENGTH)
        with pytest.raises(TimeoutError, match="request 0 has not ended yet"):
            handle.result(timeout=0.01)
        engine._thread = None
        assert handle.result(timeout=60).finish_reason == "length"


def test_asyncio_streams_results_and_generates():
    async def main():
        async def tokens(i):
            return [token async for token in engine.submit(prompt_of(i), LENGTH)]

        async def text(i):
            handle = engine.submit(prompt_of(i), LENGTH)
            return "".join([piece async for piece in handle.atexts()])

        streams = await asyncio.gather(*(tokens(i) for i in range(6)))
        texts = await asyncio.gather(*(text(i) for i in range(6)))
        result = await engine.submit(prompt_of(6), LENGTH).aresult()
        outputs = await engine.agenerate([prompt_of(7)] * 2, LENGTH)
        await engine.adrain()
        with pytest.raises(EngineClosed):
            engine.submit([1])
        await engine.aclose()
        return streams, texts, result, outputs

    engine = make(tokenizer=Letters())
    streams, texts, result, outputs = asyncio.run(main())
    want = [serial(prompt_of(i), LENGTH)[0] for i in range(8)]
    assert streams == want[:6]
    assert texts == [Letters().decode(tokens) for tokens in want[:6]]
    assert result.tokens == want[6]
    assert [output.tokens for output in outputs] == [want[7]] * 2
    assert engine.runner.closed


def test_a_cancelled_await_leaves_the_request_and_the_engine_alone():
    async def main():
        gate.acquire()
        handle = engine.submit(prompt_of(0), LENGTH)
        task = asyncio.create_task(handle.aresult())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.release()
        return await handle.aresult()

    gate = threading.Lock()
    with make() as engine:
        launch = engine.runner.launch

        def held(batch):
            with gate:
                return launch(batch)

        engine.runner.launch = held
        assert asyncio.run(main()).tokens == serial(prompt_of(0), LENGTH)[0]


def test_an_event_loop_that_is_gone_does_not_stop_the_engine():
    async def leave(handle):
        asyncio.create_task(handle.aresult())  # noqa: RUF006 nobody awaits it
        await asyncio.sleep(0)

    with make() as engine:
        launch, gate = engine.runner.launch, threading.Event()
        engine.runner.launch = lambda batch: gate.wait() and launch(batch)
        handle = engine.submit(prompt_of(0), LENGTH)
        asyncio.run(leave(handle))
        gate.set()
        assert handle.result(timeout=60).tokens == serial(prompt_of(0), LENGTH)[0]


def test_cancel_from_another_thread_and_close_under_load():
    engine = make()
    engine.run_in_thread()
    handles = [engine.submit(prompt_of(i), SamplingParams(max_tokens=50)) for i in range(20)]
    handles[3].cancel()
    handles[19].cancel()
    assert handles[0].result(timeout=60).finish_reason == "length"
    assert handles[19].result(timeout=60).finish_reason == "cancelled"
    assert handles[3].result(timeout=60).finish_reason in ("cancelled", "length")
    engine.close()
    assert all(handle.finish_reason in ("length", "cancelled") for handle in handles)


def test_readers_of_an_engine_that_breaks_down_are_told():
    engine = make()
    engine.runner.explode = True
    engine.run_in_thread()
    for _ in range(3):  # the third request in a row that fails alone is one too many
        output = engine.submit(prompt_of(0)).result(timeout=60)
        assert output.finish_reason == "error"
        assert "boom" in output.error
    with pytest.raises(EngineClosed, match="boom"):
        engine.submit(prompt_of(0))
    engine.close()


def test_text_needs_a_tokenizer():
    with make() as engine:
        handle = engine.submit(prompt_of(0), LENGTH)
        assert handle.result().text is None
        with pytest.raises(ValueError, match="needs an engine with a tokenizer"):
            next(handle.texts())
