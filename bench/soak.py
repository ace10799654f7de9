"""Half an hour of four times the load that the server can carry, with faults injected.

    python -m bench.soak --minutes 30      # writes bench/results/soak.json

The server is a process of its own, this one its clients. First, without faults, twice as many clients
as there are slots ask one request after the other: the peak. Then requests arrive at four times the
peak's rate, whatever the server does. Some clients go away, some do not read, some send what is no
request or a prompt that the model fails on; and now and then the engine breaks down. Then the peak
again: the machine may have another speed by now. Checked at the end, with a failing exit status:

- memory is flat: the median of the last fifth is within 2 % of that of the second fifth;
- every admitted request ended exactly once, nothing is owed, and every client had its answer;
- refusals (429) come within 20 ms, 99 of 100;
- goodput, tokens of whole answers a second, is at least 95 % of the mean of both peaks.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import math
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.workloads import Request, load_workload

# No torch here: what it takes of a core, and of memory to look through for garbage, would count as
# the server's.
RESULT = Path(__file__).parent / "results" / "soak.json"
LOAD = 4  # times the peak
PATIENCE_S = 90  # an answer that takes longer is lost: the server's own deadline is 60
# Of the arrivals, one in so many:
FAULTS = {"leaves": 50, "never reads": 500, "poison": 100, "no request": 20, "too large": 200}
POISON = 1023  # a token of every model here
BODIES = 500  # made in advance
BAD_BODIES = (
    b"", b"{", b"[" * 5000, b'{"model": "soak", "prompt": "x", "max_tokens": -5}',
    b'{"model": "soak", "prompt": [-1]}', b'{"model": "soak", "prompt": 7, "x": NaN}', b"\xff\xfe",
)  # fmt: skip


@dataclass
class Tally:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0  # of whole answers
    refusals_s: list[float] = field(default_factory=list)
    unexpected: Counter[str] = field(default_factory=Counter)
    crashes: int = 0
    resident: list[int] = field(default_factory=list)


class Load:
    """Clients of one server, in one event loop."""

    def __init__(self, port: int, workload: list[Request], seed: int) -> None:
        self._port = port
        self._workload = workload
        self._random = random.Random(seed)
        self.tally = Tally()
        self._bodies = {
            (stream, poison): itertools.cycle([self._body(stream, poison) for _ in range(BODIES)])
            for stream in (False, True)
            for poison in (False, True)
        }

    def body(self, stream: bool, poison: bool = False) -> bytes:
        return next(self._bodies[stream, poison])

    def _body(self, stream: bool, poison: bool) -> bytes:
        shape = self._random.choice(self._workload)
        prompt = [self._random.randrange(POISON) for _ in range(shape.prompt)]
        if poison:
            prompt[-1] = POISON
        return json.dumps({
            "model": "soak", "prompt": prompt, "max_tokens": shape.output, "temperature": 0,
            "ignore_eos": True, "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        }).encode()  # fmt: skip

    async def fetch(self, path: str) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        return json.loads(answer.partition(b"\r\n\r\n")[2])

    async def ask(self, body: bytes, fault: str | None = None) -> int:
        """One request; gives the tokens of its answer, 0 when it had no whole one."""
        begun = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
        try:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            if fault == "never reads":
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                await asyncio.sleep(5)
                return 0
            status = int((await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1])
            if status == 429:
                self.tally.refusals_s.append(time.monotonic() - begun)
            if fault == "leaves" and status == 200:
                await reader.read(1)
                self.tally.outcomes["left"] += 1
                return 0
            answer = await reader.read()
            return self._judge(status, answer, fault)
        finally:
            writer.transport.abort()

    def _judge(self, status: int, answer: bytes, fault: str | None) -> int:
        if status == 200 and b'"usage":{' in answer and b'"error"' not in answer:
            self.tally.outcomes["whole"] += 1
            tokens = int(answer.rpartition(b'"completion_tokens":')[2].split(b",")[0])
            self.tally.tokens += tokens
            return tokens
        if status == 200:  # a stream can only say it at its end
            status = 500 if b'"error"' in answer else 0
        expected = {
            "poison": {429, 500, 503}, "no request": {400, 429, 503}, "too large": {413},
        }.get(fault or "", {429, 500, 503, 504})  # fmt: skip
        if status in expected:
            self.tally.outcomes[f"{fault}: {status}" if fault else str(status)] += 1
        else:
            self.tally.unexpected[f"{fault}: {status}"] += 1
        return 0

    async def one(self, fault: str | None) -> None:
        """An arrival, whatever becomes of it."""
        stream = fault in ("leaves", "never reads") or self._random.random() < 0.5
        if fault == "no request":
            body = self._random.choice(BAD_BODIES)
        elif fault == "too large":
            body = b" " * (1 << 17)
        else:
            body = self.body(stream, fault == "poison")
        try:
            await asyncio.wait_for(self.ask(body, fault), PATIENCE_S)
        except asyncio.TimeoutError:
            self.tally.unexpected["lost"] += 1
        except (OSError, asyncio.IncompleteReadError) as error:
            # A server that says 413 does not read on, and its word can be lost with the connection.
            harmless = fault in ("too large", "never reads")
            kind = self.tally.outcomes if harmless else self.tally.unexpected
            kind[f"{fault}: {type(error).__name__}"] += 1

    async def peak(self, seconds: float) -> tuple[float, float]:
        """Tokens and requests a second of clients that keep every slot busy."""
        end = time.monotonic() + seconds
        done: list[tuple[float, int]] = []

        async def client() -> None:
            while time.monotonic() < end:
                tokens = await self.ask(self.body(self._random.random() < 0.5))
                done.append((time.monotonic(), tokens))

        slots = (await self.fetch("/ledger"))["slots"]
        await asyncio.gather(*(client() for _ in range(2 * slots)))
        inside = [tokens for at, tokens in done if at <= end]
        return sum(inside) / seconds, len(inside) / seconds

    async def storm(self, rate: float, seconds: float, crash_every: float, server: Any) -> float:
        """Arrivals at ``rate`` for so long; gives tokens a second of whole answers."""
        running: set[asyncio.Task[None]] = set()
        begun = at = time.monotonic()
        next_look, next_crash = begun, begun + crash_every
        while at < begun + seconds:
            at += self._random.expovariate(rate)
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            fault = next((f for f, n in FAULTS.items() if self._random.randrange(n) == 0), None)
            task = asyncio.create_task(self.one(fault))
            running.add(task)
            task.add_done_callback(running.discard)
            if at >= next_crash:
                server.send_signal(signal.SIGUSR1)
                self.tally.crashes += 1
                next_crash += crash_every
            if at >= next_look:
                self.tally.resident.append((await self.fetch("/ledger"))["resident_bytes"])
                next_look += 1.0
        goodput = self.tally.tokens / (time.monotonic() - begun)
        await asyncio.gather(*running)
        return goodput

    async def settled(self) -> dict[str, Any]:
        """The server's own account, once nothing runs."""
        for _ in range(600):
            live = await self.fetch("/live")
            engine = live["engine"]
            if engine and not (engine["running"] or engine["waiting"] or live["admitted_tokens"]):
                break
            await asyncio.sleep(0.1)
        ledger = await self.fetch("/ledger")
        free = engine["free_blocks"] + engine["idle_blocks"] == engine["total_blocks"]
        return {
            **ledger, "running": engine["running"], "waiting": engine["waiting"],
            "admitted_tokens": live["admitted_tokens"], "all_blocks_free": free,
            "restarts": live["restarts"],
        }  # fmt: skip


async def soak(port: int, minutes: float, server: Any) -> dict[str, Any]:
    load = Load(port, load_workload("mixed"), seed=1)
    gc.collect()
    gc.freeze()
    await load.peak(5)  # warm
    calm_s = max(20.0, 2 * minutes)
    before, requests = await load.peak(calm_s)
    print(f"peak: {before:.0f} tokens/s, {requests:.1f} requests/s", flush=True)
    tally = load.tally = Tally()
    seconds = 60 * minutes
    goodput = await load.storm(LOAD * requests, seconds, max(30.0, seconds / 10), server)
    account = await load.settled()
    load.tally = Tally()
    after, _ = await load.peak(calm_s)
    tokens = (before + after) / 2
    fifth = max(1, len(tally.resident) // 5)
    early = statistics.median(tally.resident[fifth : 2 * fifth])
    late = statistics.median(tally.resident[-fifth:])
    refusals = sorted(tally.refusals_s)
    p50, p99, worst = (
        [1e3 * refusals[int(share * (len(refusals) - 1))] for share in (0.5, 0.99, 1.0)]
        if refusals
        else [math.inf] * 3
    )
    return {
        "minutes": minutes,
        "arrivals_per_second": LOAD * requests,
        "peak_tokens_per_second": {"before": before, "after": after},
        "goodput_tokens_per_second": goodput,
        "goodput_of_peak": goodput / tokens,
        "refusals": len(refusals),
        "refusal_ms": {"median": p50, "p99": p99, "worst": worst},
        "resident_mib": {"second fifth": early / 2**20, "last fifth": late / 2**20},
        "outcomes": dict(sorted(tally.outcomes.items())),
        "unexpected": dict(tally.unexpected),
        "account": account,
        "checks": {
            "memory flat": late <= 1.02 * early,
            "every admitted request ended exactly once": account["admitted"] == account["ended"]
            and account["ended_again"] == account["open"] == 0,
            "nothing owed": account["all_blocks_free"]
            and account["running"] == account["waiting"] == account["admitted_tokens"] == 0,
            "nothing lost": not tally.unexpected,
            "every engine that broke down came back": account["restarts"] == tally.crashes > 0,
            "only engines that broke down failed anyone": tally.outcomes["500"]
            <= account["restarts"] * (account["slots"] + account["queue"]),
            "p99 refusal < 20 ms": p99 < 20,
            "goodput >= 95 % of peak": goodput >= 0.95 * tokens,
        },
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the server does not listen")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--model",
        default="llama",
        help="llama: 8 layers, 512 wide, random weights; or a carried model, as effinfer serve says",
    )
    parser.add_argument("--out", type=Path, help=f"default: {RESULT.name}, of 30 minutes or more")
    options = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "bench.soak_server", options.model, str(port)]
    with subprocess.Popen(command) as server:
        try:
            wait_until_ready(port, server)
            found = asyncio.run(soak(port, options.minutes, server))
        finally:
            server.send_signal(signal.SIGTERM)
        found["checks"]["SIGTERM drains"] = server.wait(60) == -signal.SIGTERM
    from bench.peers.common import commit, machine  # which imports torch

    found = {"model": options.model, "commit": commit(), "machine": machine(), **found}
    print(json.dumps(found, indent=2))
    out = options.out or (RESULT if options.minutes >= 30 else None)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(found["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
