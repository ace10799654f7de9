"""What a request must give: the fake model run alone, position by position, with plain lists."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.engine.fake import FakeModel, choose, embed, mix, next_state, output, weight

_MASK = (1 << 64) - 1


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    hidden: list[int] = field(default_factory=list)  # that each token came from
    stopped: bool = False


class Oracle:
    """One request on a :class:`FakeModel`. ``mode`` is "full" or "exit"; ``chunk`` matters only to
    the shared plane, whose contents depend on where a prompt is cut."""

    def __init__(self, model: FakeModel, mode: str, chunk: int):
        self.model, self.mode, self.chunk = model, mode, chunk
        self.fills = model.has_state or model.kv_policy == "depth" or not model.has_kv

    def answer(
        self,
        prompt: tuple[int, ...],
        max_new_tokens: int,
        stop_ids: tuple[int, ...],
        min_loops: int = 1,
        max_loops: int | None = None,
    ) -> Answer:
        model = self.model
        self.least = max(min_loops, model.r_min)
        self.most = max_loops or model.loops
        self.tokens: list[int] = []
        self.keys: list[dict[int, int]] = [{} for _ in range(model.loops)]
        self.states = [0] * model.loops
        self.told = 0
        answer = Answer()
        for first in range(0, len(prompt), self.chunk):
            token, depth, hidden = self._run(prompt[first : first + self.chunk], len(prompt))
        while True:
            answer.tokens.append(token)
            answer.depths.append(depth)
            answer.hidden.append(hidden)
            answer.stopped = token in stop_ids
            if answer.stopped or len(answer.tokens) == max_new_tokens:
                return answer
            token, depth, hidden = self._run((token,), len(prompt))

    def _run(self, tokens: tuple[int, ...], prompt: int) -> tuple[int, int, int]:
        """The next token after these, the loops it took, the hidden state that told it."""
        model, first = self.model, len(self.tokens)
        self.tokens += tokens
        positions = range(first, len(self.tokens))
        hidden = {p: embed(self.tokens[p]) for p in positions}
        for token in tokens:
            self.told = next_state(self.told, embed(token))
        chosen = (-1, 0, 0)
        for loop in range(model.loops):
            plane = model.plane(loop)
            for p in positions:
                if model.kv_policy != "first" or loop == 0:
                    self.keys[plane][p] = mix(hidden[p]) | 1
            for p in positions:
                attended = sum(k * weight(q) for q, k in self.keys[plane].items() if q <= p)
                if model.has_state:
                    self.states[loop] = next_state(self.states[loop], hidden[p])
                hidden[p] = output(
                    hidden[p],
                    attended & _MASK if model.has_kv else 0,
                    self.states[loop] if model.has_state else 0,
                    loop,
                )
            last = positions[-1]
            if chosen[1]:
                continue
            token, leaves = choose(model, self.tokens[-1], self._seen(), hidden[last])
            leaves = loop >= self.most - 1 or (leaves and loop >= self.least - 1)
            if loop == model.loops - 1 or (leaves and self._may_exit(last < prompt)):
                chosen = (token, loop + 1, hidden[last])
                # One position of 64 is held against full depth, and its loops run for it.
                sampled = model.kv_policy == "propagate" and (last + 1) % 64 == 0
                if not self.fills and not sampled:
                    if model.kv_policy == "propagate":
                        for deeper in range(loop + 1, model.loops):
                            self.keys[deeper][last] = mix(hidden[last]) | 1
                    break
        return chosen

    def _seen(self) -> int:
        if not self.model.has_kv:
            return self.told
        return sum(embed(t) * weight(q) for q, t in enumerate(self.tokens)) & _MASK

    def _may_exit(self, in_prompt: bool) -> bool:
        if in_prompt and self.model.kv_policy in ("shared", "propagate"):
            return False
        return self.mode == "exit"
