"""What the engine gives, in OpenAI's words: whole answers and the events of streams."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from effinfer.engine import Handle, TokenLogprobs
from effinfer.serve.errors import ApiError
from effinfer.serve.words import Characters, printed, token_bytes


def usage(handles: Sequence[Handle], prompts: int) -> dict[str, int]:
    """Token counts; the choices of one prompt count it once."""
    each = max(1, len(handles) // max(prompts, 1))
    prompt = sum(len(handle.prompt) for handle in handles[::each])
    completion = sum(len(handle.tokens) for handle in handles)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


class Choice:
    """One choice of an answer, and how far its log probabilities have been told."""

    def __init__(self, index: int, handle: Handle) -> None:
        self.index = index
        self.handle = handle
        self.characters = Characters()  # of the tokens that have been told
        self.offset = 0  # how many
        self._told = 0

    def new_logprobs(self) -> list[tuple[int, TokenLogprobs]] | None:
        """Tokens that have come since the last call, with theirs; None when not asked for."""
        handle = self.handle
        if handle.logprobs is None:
            return None
        start, self._told = self._told, len(handle.tokens)  # the engine's thread adds to them
        return [(handle.tokens[i], handle.logprobs[i]) for i in range(start, self._told)]


class Answers:
    """Builds the answers to one request.

    Args:
        model: its name.
        tokenizer: for the text of single tokens.
        prompts: how many the request has.
    """

    object_name = ""
    chunk_name = ""
    id_prefix = ""

    def __init__(self, model: str, tokenizer: Any, prompts: int) -> None:
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = prompts

    async def whole(self, handles: Sequence[Handle]) -> dict[str, Any]:
        """The answer once every choice has ended.

        Raises:
            ApiError: 500 when a choice failed; 504 or 503 when none had a token before its deadline,
                or before the server stopped.
        """
        outputs = [await handle.aresult() for handle in handles]
        failed = next((o for o in outputs if o.finish_reason == "error"), None)
        if failed is not None:
            raise _failed(failed.error)
        if not any(output.tokens for output in outputs):
            reasons = {output.finish_reason for output in outputs}
            if reasons == {"deadline"}:
                raise ApiError(504, "no token before the deadline", code="deadline")
            if reasons == {"cancelled"}:
                raise ApiError(503, "the server is stopping", retry_after_s=1)
        choices = [
            self._choice(Choice(index, handle), output.text or "", output.finish_reason)
            for index, (output, handle) in enumerate(zip(outputs, handles, strict=True))
        ]
        answer = self._frame(self.object_name, choices)
        answer["usage"] = usage(handles, self._prompts)
        return answer

    async def events(
        self, handles: Sequence[Handle], with_usage: bool
    ) -> AsyncGenerator[Any, None]:
        """Chunks as they come, of all choices; then the usage, when asked for."""
        choices = [Choice(index, handle) for index, handle in enumerate(handles)]
        for choice in choices:
            for first in self._first(choice):
                yield self._frame(self.chunk_name, [first])
        async with aclosing(_merged([self._pieces(choice) for choice in choices])) as pieces:
            async for piece in pieces:
                yield piece if "error" in piece else self._frame(self.chunk_name, [piece])
        if with_usage:
            yield {**self._frame(self.chunk_name, []), "usage": usage(handles, self._prompts)}

    async def _pieces(self, choice: Choice) -> AsyncGenerator[Any, None]:
        """A choice's parts of chunks as they come, or what went wrong."""
        try:
            async for text in choice.handle.atexts():
                yield self._piece(choice, text, None)
            yield self._last(choice)
        except Exception as error:  # of the tokenizer: the client is told here too
            yield _failed(f"{type(error).__name__}: {error}").body()

    def _frame(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _word(self, token: int) -> bytes:
        return token_bytes(self._tokenizer, token)

    def _first(self, choice: Choice) -> list[Any]:
        """What a choice's stream begins with."""
        return []

    def _last(self, choice: Choice) -> Any:
        handle = choice.handle
        if handle.finish_reason == "error":
            return _failed(handle.error).body()
        return self._piece(choice, "", handle.finish_reason)

    def _choice(self, choice: Choice, text: str, reason: str) -> Any:
        """A whole choice."""
        raise NotImplementedError

    def _piece(self, choice: Choice, text: str, reason: str | None) -> Any:
        """A choice's part of a chunk."""
        raise NotImplementedError


class CompletionAnswers(Answers):
    """Of ``/v1/completions``."""

    object_name = chunk_name = "text_completion"
    id_prefix = "cmpl"

    def _choice(self, choice: Choice, text: str, reason: str) -> Any:
        return self._piece(choice, text, reason)

    def _piece(self, choice: Choice, text: str, reason: str | None) -> Any:
        logprobs = self._logprobs(choice)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        found = choice.new_logprobs()
        if found is None:
            return None
        words = [self._word(token) for token, _ in found]
        offsets = [choice.offset, *map(choice.characters.after, words)]
        choice.offset = offsets.pop()
        return {
            "tokens": [printed(word) for word in words],
            "token_logprobs": [_finite(p.logprob) for _, p in found],
            "top_logprobs": [
                {printed(self._word(t)): _finite(q) for t, q in p.top} for _, p in found
            ],
            "text_offset": offsets,
        }


class ChatAnswers(Answers):
    """Of ``/v1/chat/completions``."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def _choice(self, choice: Choice, text: str, reason: str) -> Any:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(choice),
            "finish_reason": reason,
        }

    def _first(self, choice: Choice) -> list[Any]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def _piece(self, choice: Choice, text: str, reason: str | None) -> Any:
        return {
            "index": choice.index,
            "delta": {"content": text} if text else {},
            "logprobs": self._logprobs(choice),
            "finish_reason": reason,
        }

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        found = choice.new_logprobs()
        if found is None:
            return None
        return {"content": [self._token(token, p.logprob, p.top) for token, p in found]}

    def _token(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> Any:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            word = self._word(token)
            text = word.decode(errors="replace")
            return {"token": text, "logprob": _finite(logprob), "bytes": list(word)}

        return {**entry(token, logprob), "top_logprobs": [entry(*one) for one in top]}


async def _merged(sources: Sequence[AsyncGenerator[Any, None]]) -> AsyncGenerator[Any, None]:
    """What all of the sources give, as it comes."""
    if len(sources) == 1:  # nearly always, and then without a task of its own
        async for piece in sources[0]:
            yield piece
        return
    queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)  # a slow reader holds its own back

    async def follow(source: AsyncGenerator[Any, None]) -> None:
        async for piece in source:
            await queue.put(piece)
        await queue.put(None)

    followers = [asyncio.ensure_future(follow(source)) for source in sources]
    try:
        left = len(followers)
        while left:
            piece = await queue.get()
            if piece is None:
                left -= 1
            else:
                yield piece
    finally:
        for follower in followers:
            follower.cancel()


def _failed(what: str | None) -> ApiError:
    return ApiError(500, what or "the request failed", code="request_failed")


def _finite(logprob: float) -> float:
    """``logprob`` as JSON can say it, which knows no infinity; OpenAI's own stand-in."""
    return max(logprob, -9999.0)
