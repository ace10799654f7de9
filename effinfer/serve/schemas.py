"""Bodies of requests, checked before the engine hears of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from effinfer.engine.params import MAX_STOP_STRINGS, SamplingParams

Token = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Prompt = StrictStr | list[StrictStr] | list[Token] | list[list[Token]]
Penalty = Annotated[float, Field(ge=-2, le=2, strict=True, allow_inf_nan=False)]
Loops = Annotated[StrictInt, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """What a stream carries beside its text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False


class Sampling(BaseModel):
    """Fields that completions and chat share; the second half are extensions."""

    model_config = ConfigDict(extra="forbid")

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
    user: StrictStr | None = None  # taken and not looked at

    top_k: Annotated[StrictInt, Field(ge=0, lt=2**31)] = 0
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
            top_k=self.top_k,
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
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None
    logit_bias: None = None

    def prompts(self) -> list[Any]:
        """The prompts, texts or lists of tokens."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    """A turn of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]
    name: StrictStr | None = None

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
    response_format: None = None
    logit_bias: None = None
    tools: None = None
    tool_choice: None = None
