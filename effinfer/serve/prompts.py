"""Tokens of prompts and chats."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from effinfer.serve.errors import bad_field
from effinfer.serve.schemas import Message

_LONG = 4096  # characters; shorter texts take less time to tokenize than a thread to start


async def prompt_tokens(tokenizer: Any, prompt: str | list[int]) -> list[int]:
    """Token ids of one prompt of ``/v1/completions``.

    Raises:
        ApiError: 400, the tokenizer can't read it.
    """
    if not isinstance(prompt, str):
        return prompt
    return await _tokenized("prompt", len(prompt), lambda: tokenizer(prompt)["input_ids"])


async def chat_tokens(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat, by the model's chat template; without one, of its texts in a row.

    Raises:
        ApiError: 400, the template refuses the turns.
    """
    turns = [message.turn() for message in messages]
    if getattr(tokenizer, "chat_template", None) is None:
        # A model that was never taught turns continues what was said.
        text = "\n\n".join(turn["content"] for turn in turns)
        return await _tokenized("messages", len(text), lambda: tokenizer(text)["input_ids"])

    def templated() -> Any:
        return tokenizer.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]

    return await _tokenized("messages", sum(len(turn["content"]) for turn in turns), templated)


async def _tokenized(field: str, characters: int, tokenize: Callable[[], Any]) -> list[int]:
    """``tokenize()``, in a thread where it would hold up everybody's streams."""
    try:
        found = tokenize() if characters < _LONG else await asyncio.to_thread(tokenize)
    except Exception as error:  # templates are programs, and refuse turns as they like
        raise bad_field(field, f"cannot be tokenized: {error}") from error
    return list(found)
