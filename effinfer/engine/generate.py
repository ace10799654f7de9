"""``model.generate(custom_generate=effinfer.generate)``: transformers' generate on the engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from effinfer.engine.engine import Engine
from effinfer.engine.handle import Output
from effinfer.engine.params import SamplingParams
from effinfer.errors import EffinferError

# Arguments that say nothing the engine does not know by itself.
_IMPLIED = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position"}
# Fields of a generation configuration that ask for something else than the engine does.
_UNSUPPORTED = (
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "penalty_alpha",
    "dola_layers",
    "assistant_early_exit",
)
_CACHES = ("past_key_values", "cache_params")


def generate(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Iterable[Any] = (),
    stopping_criteria: Iterable[Any] = (),
    generation_config: Any = None,
    engine: Engine | None = None,
    max_ngram: int = 0,
    **model_kwargs: Any,
) -> Any:
    """Decode with the engine: ``model.generate(ids, ..., custom_generate=effinfer.generate)``.

    Greedy tokens are transformers' own. Sampled ones follow the same distribution, from seeds that
    ``torch.manual_seed`` determines. Rows may differ in length (left padding, ``attention_mask``);
    a penalty does not count the padding. A ``streamer`` gets the tokens of a batch of one as they
    come.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config: from transformers.
        engine: one that runs ``model`` already; None makes one for this call.
        max_ngram: tokens to draft from the sequence itself, as transformers' own
            ``prompt_lookup_num_tokens``, which counts as this; but for every architecture and batch.

    Returns:
        ``(batch, length)`` int64, padded on the right, or a ``GenerateDecoderOnlyOutput`` of them.

    Raises:
        ValueError: an option that has no counterpart here; the message names it.
        EffinferError: a request failed.
    """
    streamer, assistant = _not_handed_on()
    _refuse_unsupported(generation_config, {**model_kwargs, "assistant_model": assistant})
    if streamer is not None and len(input_ids) > 1:
        raise ValueError("effinfer.generate: a streamer is for a batch of one")
    prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
    _check_positions(model_kwargs.get("position_ids"), prompts)
    wanted = _Wanted(input_ids.shape[1], sample=bool(generation_config.do_sample))
    for processor in logits_processor:
        wanted.read(processor, _PROCESSORS)
    for criterion in stopping_criteria:
        wanted.read(criterion, _CRITERIA)
    if wanted.max_tokens is None:
        raise ValueError("effinfer.generate: no max_length or max_new_tokens is set")
    if wanted.max_tokens < 1:
        return input_ids
    seeds = torch.randint(2**62, (len(prompts),)).tolist()
    params = [wanted.params(seed) for seed in seeds]
    if engine is not None:
        outputs = _run(engine, prompts, params, wanted.max_time, streamer)
    else:
        positions = max(len(prompt) for prompt in prompts) + wanted.max_tokens
        with Engine(
            model,
            max_slots=len(prompts),
            token_budget=min(max(256, len(prompts)), len(prompts) * positions),
            max_positions=positions,
            max_ngram=max_ngram or generation_config.prompt_lookup_num_tokens or 0,
            prefix_cache=False,
        ) as made:
            outputs = _run(made, prompts, params, wanted.max_time, streamer)
    sequences = _padded(input_ids, outputs, generation_config)
    if not generation_config.return_dict_in_generate:
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)


class _Wanted:
    """What transformers' processors and criteria ask for, as the engine's parameters."""

    def __init__(self, padded_length: int, sample: bool) -> None:
        self.padded_length = padded_length
        self.fields: dict[str, Any] = {"temperature": 1.0 if sample else 0.0}
        self.stop_ids: list[int] = []
        self.max_tokens: int | None = None
        self.max_time: float | None = None
        self.min_tokens = 0

    def read(self, item: Any, known: dict[str, Callable[[_Wanted, Any], None]]) -> None:
        """Take over one processor or criterion; ValueError for one that can't be."""
        name = type(item).__name__
        if name not in known or not type(item).__module__.startswith("transformers."):
            raise ValueError(
                f"effinfer.generate: {name} has no counterpart in the engine; it takes "
                + ", ".join(known)
            )
        known[name](self, item)

    def params(self, seed: int) -> SamplingParams:
        assert self.max_tokens is not None
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=min(self.min_tokens, self.max_tokens),
            stop_token_ids=self.stop_ids,
            ignore_eos=True,  # transformers' criteria say what ends a sequence
            seed=seed,
            **self.fields,
        )

    def at_least(self, length: int) -> None:
        """Generate at least so many tokens."""
        self.min_tokens = max(self.min_tokens, length)

    def at_most(self, length: int) -> None:
        """Generate at most so many tokens."""
        self.max_tokens = length if self.max_tokens is None else min(length, self.max_tokens)


def _repetition_penalty(wanted: _Wanted, processor: Any) -> None:
    if getattr(processor, "prompt_ignore_length", None):
        raise ValueError("effinfer.generate: prompt_ignore_length has no counterpart in the engine")
    wanted.fields["repetition_penalty"] = float(processor.penalty)


def _field(name: str) -> Callable[[_Wanted, Any], None]:
    return lambda wanted, item: wanted.fields.__setitem__(name, getattr(item, name))


_PROCESSORS: dict[str, Callable[[_Wanted, Any], None]] = {
    "TemperatureLogitsWarper": _field("temperature"),
    "TopKLogitsWarper": _field("top_k"),
    "TopPLogitsWarper": _field("top_p"),
    "MinPLogitsWarper": _field("min_p"),
    "RepetitionPenaltyLogitsProcessor": _repetition_penalty,
    "MinLengthLogitsProcessor": lambda w, p: w.at_least(p.min_length - w.padded_length),
    "MinNewTokensLengthLogitsProcessor": lambda w, p: w.at_least(p.min_new_tokens),
    "LogitNormalization": lambda w, p: None,  # changes no order and no probability
}
_CRITERIA: dict[str, Callable[[_Wanted, Any], None]] = {
    "MaxLengthCriteria": lambda w, c: w.at_most(c.max_length - w.padded_length),
    "MaxTimeCriteria": lambda w, c: setattr(w, "max_time", c.max_time),
    "EosTokenCriteria": lambda w, c: w.stop_ids.extend(c.eos_token_id.flatten().tolist()),
}


def _not_handed_on() -> tuple[Any, Any]:
    """The streamer and the assistant_model of the call of transformers' generate, which hands them to
    no custom function: whoever reads from a streamer would wait for ever."""
    from transformers import GenerationMixin

    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    given = {} if frame is None else frame.f_locals
    return given.get("streamer"), given.get("assistant_model")


def _refuse_unsupported(config: Any, model_kwargs: dict[str, Any]) -> None:
    wrong = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if (config.num_beams or 1) > 1:
        wrong.append("num_beams")
    if config.cache_implementation == "quantized":
        wrong.append("cache_implementation 'quantized' (Engine has kv_dtype)")
    for name in _CACHES:
        if _holds_tokens(model_kwargs.get(name)):
            wrong.append(f"{name} with tokens in it")
    wrong += [
        name
        for name, value in model_kwargs.items()
        if name not in _IMPLIED and name not in _CACHES and value is not None
    ]
    if wrong:
        names = ", ".join(dict.fromkeys(wrong))
        raise ValueError(f"effinfer.generate: not supported: {names}")


def _holds_tokens(cache: Any) -> bool:
    if cache is None:
        return False
    try:
        return bool(cache.get_seq_length() > 0)
    except (ValueError, IndexError):  # a cache of recurrent states alone has no length
        return bool(cache.has_previous_state())


def _prompts(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    """Each row's tokens without its padding on the left."""
    if mask is None:
        rows: list[list[int]] = input_ids.tolist()
        return rows
    kept = mask.bool()
    if bool((kept[:, :-1] & ~kept[:, 1:]).any()) or not bool(kept[:, -1].all()):
        raise ValueError("effinfer.generate: attention_mask must have its zeros on the left")
    return [row[one].tolist() for row, one in zip(input_ids, kept, strict=True)]


def _check_positions(position_ids: torch.Tensor | None, prompts: list[list[int]]) -> None:
    """ValueError when a prompt's tokens are not to be at 0, 1, 2 and so on."""
    if position_ids is None:
        return
    rows = position_ids.expand(len(prompts), -1).tolist()
    if any(
        row[-len(prompt) :] != list(range(len(prompt)))
        for row, prompt in zip(rows, prompts, strict=True)
    ):
        raise ValueError("effinfer.generate: position_ids must count each prompt's tokens from 0")


def _run(
    engine: Engine,
    prompts: list[list[int]],
    params: list[SamplingParams],
    max_time: float | None,
    streamer: Any,
) -> list[Output]:
    handles = [
        engine.submit(prompt, one, deadline=max_time)
        for prompt, one in zip(prompts, params, strict=True)
    ]
    if streamer is not None:
        for token in handles[0]:
            streamer.put(torch.tensor([token]))
        streamer.end()
    outputs = [handle.result() for handle in handles]
    for output in outputs:
        if output.finish_reason == "error":
            raise EffinferError(f"effinfer.generate: {output.error}")
    return outputs


def _padded(input_ids: torch.Tensor, outputs: list[Output], config: Any) -> torch.Tensor:
    width = max(len(output.tokens) for output in outputs)
    pad = getattr(config, "_pad_token_tensor", None)
    filler = 0 if pad is None else int(pad)
    new = torch.full((len(outputs), width), filler, dtype=input_ids.dtype)
    for row, output in zip(new, outputs, strict=True):
        row[: len(output.tokens)] = torch.tensor(output.tokens, dtype=input_ids.dtype)
    return torch.cat([input_ids, new.to(input_ids.device)], dim=1)
