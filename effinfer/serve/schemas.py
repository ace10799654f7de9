"""Bodies of requests, checked before the engine hears of them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from effinfer.engine.params import MAX_STOP_STRINGS, SamplingParams

Token = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Prompt = StrictStr | list[StrictStr] | list[Token] | list[list[Token]]
Penalty = Annotated[float, Field(ge=-2, le=2, strict=True, allow_inf_nan=False)]
Loops = Annotated[StrictInt, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]


def only(*neutral: Any) -> AfterValidator:
    """Of a field that is not served: refuses all but values that ask for nothing, which clients send
    of themselves, and with the answers that they send back."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in neutral):
            but = f"; only {' or '.join(map(json.dumps, neutral))} is" if neutral else ""
            raise ValueError(f"is not supported{but}")
        return value

    return AfterValidator(check)


class Body(BaseModel):
    """An object of the API: no field but its own, and null is as good as none."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class StreamOptions(Body):
    """What a stream carries beside its text."""

    include_usage: StrictBool = False


class Sampling(Body):
    """Fields that completions and chat share; the last part are extensions."""

    model: StrictStr
    n: Annotated[StrictInt, Field(ge=1, le=128)] = 1
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=True, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, strict=True, allow_inf_nan=False)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=MAX_STOP_STRINGS)] | None = None
    logit_bias: Annotated[Any, only({})] = None

    # Labels for the caller's own books, which no answer depends on: taken and not looked at.
    user: StrictStr | None = None
    metadata: dict[StrictStr, StrictStr] | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None

    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] = 0  # -1: all, as vLLM has it
    min_p: Fraction = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10, strict=True, allow_inf_nan=False)] = 1.0
    min_tokens: Annotated[StrictInt, Field(ge=0, lt=2**31)] = 0
    stop_token_ids: Annotated[list[Token], Field(max_length=256)] = []
    ignore_eos: StrictBool = False
    priority: Annotated[StrictInt, Field(ge=-1000, le=1000)] = 0
    deadline_s: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] | None = None
    mode: Literal["full", "exit", "lossless"] | None = None
    min_loops: Loops | None = None
    max_loops: Loops | None = None
    exit_threshold: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None

    def params(self, max_tokens: int, logprobs: int | None, choice: int) -> SamplingParams:
        """The engine's parameters for choice number ``choice``.

        Raises:
            ValueError: fields that don't go together; the message names one.
        """
        stop = () if self.stop is None else self.stop
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None else self.seed + choice,
            stop=stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            min_tokens=self.min_tokens,
            mode=self.mode,
            min_loops=self.min_loops or 1,
            max_loops=self.max_loops,
            exit_threshold=self.exit_threshold,
        )


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: Prompt
    max_tokens: Annotated[StrictInt, Field(ge=1, lt=2**31)] = 16
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: Annotated[Any, only(False)] = None
    best_of: Annotated[Any, only(1)] = None
    suffix: Annotated[Any, only("")] = None

    def prompts(self) -> list[Any]:
        """The prompts, texts or lists of tokens."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: StrictStr


class Message(Body):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]
    name: StrictStr | None = None
    refusal: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    tool_calls: Annotated[Any, only([])] = None

    def turn(self) -> dict[str, str]:
        """What the chat template is given."""
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": self.text(), **named}

    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    modalities: Annotated[Any, only(["text"])] = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, only(True, False)] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
