"""The HTTP application: routes, and what guards them."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse
from starlette.types import Scope

from effinfer.engine import Engine, SamplingParams
from effinfer.serve.answers import Answers, ChatAnswers, CompletionAnswers
from effinfer.serve.connection import BodyLimit, EventStream, unless_gone
from effinfer.serve.errors import ApiError, bad_field, install_handlers, named_field
from effinfer.serve.metrics import Metrics
from effinfer.serve.prompts import chat_tokens, prompt_tokens
from effinfer.serve.schemas import ChatRequest, CompletionRequest, Sampling
from effinfer.serve.settings import ServeSettings
from effinfer.serve.supervisor import Supervisor

_PAGE = Path(__file__).parent / "page" / "index.html"
# The page asks this server alone, and no other page frames it.
_PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    make_engine: Callable[[], Engine], tokenizer: Any, settings: ServeSettings
) -> FastAPI:
    """An OpenAI-compatible application over an engine.

    Args:
        make_engine: makes the engine when the application starts, and again should it break down.
        tokenizer: the model's.
        settings: see :class:`ServeSettings`.
    """
    supervisor = Supervisor(make_engine, settings)
    metrics = Metrics(supervisor)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await supervisor.start()
        yield
        await supervisor.stop()

    app = FastAPI(title="effinfer", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.supervisor = supervisor

    def refusal(scope: Scope) -> ApiError | None:
        return supervisor.refusal() if scope["method"] == "POST" else None

    app.add_middleware(
        BodyLimit,
        limit=settings.max_body_bytes,
        seconds=settings.read_timeout_s,
        refusal=refusal,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    install_handlers(app)

    async def authorized(request: Request) -> None:  # a plain function would get a thread
        if settings.api_key is None:
            return
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {settings.api_key}".encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def json_body(request: Request) -> None:
        # Any page may have a browser send what is no JSON by its type; for JSON it asks CORS first.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"Content-Type must be application/json, got {kind or 'none'}")

    guarded = [Depends(authorized)]
    asked = [*guarded, Depends(json_body)]

    async def run(
        request: Request,
        body: Sampling,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        field: str,
        answers: Answers,
    ) -> Response:
        deadline = min(settings.deadline_s, body.deadline_s or settings.deadline_s)
        handles = supervisor.submit(prompts, params, deadline, body.priority, field)

        def at_end() -> None:
            metrics.observe(handles)
            supervisor.release(handles)

        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(answers.events(handles, with_usage), at_end)
        try:
            whole = await unless_gone(request, asyncio.ensure_future(answers.whole(handles)))
        finally:
            at_end()
        return Response(status_code=499) if whole is None else JSONResponse(whole)

    def choices(
        body: Sampling, prompts: int, max_tokens: int, logprobs: int | None
    ) -> list[SamplingParams]:
        """Parameters of the ``n`` choices that each prompt has."""
        if body.model != settings.model_name:
            raise ApiError(
                404, f"model: {body.model!r} is not here; {settings.model_name!r} is", "model",
                "model_not_found",
            )  # fmt: skip
        if prompts * body.n > settings.max_choices:
            raise bad_field("n", f"prompts times n may be {settings.max_choices} at most")
        try:
            return [body.params(max_tokens, logprobs, choice) for choice in range(body.n)]
        except (ValueError, TypeError) as error:
            raise named_field(error) from error

    @app.post("/v1/completions", dependencies=asked)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        given = body.prompts()
        if not given:
            raise bad_field("prompt", "must not be empty")
        params = choices(body, len(given), body.max_tokens, body.logprobs)
        prompts = [await prompt_tokens(tokenizer, prompt) for prompt in given]
        answers = CompletionAnswers(body.model, tokenizer, len(prompts))
        each = [prompt for prompt in prompts for _ in params]
        return await run(request, body, each, params * len(prompts), "prompt", answers)

    @app.post("/v1/chat/completions", dependencies=asked)
    async def chat(request: Request, body: ChatRequest) -> Response:
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_field("top_logprobs", "needs logprobs to be true")
        prompt = await chat_tokens(tokenizer, body.messages)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        most = body.max_completion_tokens or body.max_tokens or supervisor.room(prompt)
        params = choices(body, 1, most, logprobs)
        answers = ChatAnswers(body.model, tokenizer, 1)
        return await run(request, body, [prompt] * body.n, params, "messages", answers)

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(settings, created)]}

    @app.get("/v1/models/{name}", dependencies=guarded)
    async def model(name: str) -> dict[str, Any]:
        if name != settings.model_name:
            raise ApiError(404, f"model: {name!r} is not here", "model", "model_not_found")
        return _model_card(settings, created)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        if supervisor.ready:
            return JSONResponse({"status": "ready"})
        state = "stopping" if supervisor.draining else "restarting"
        return JSONResponse({"status": state, "error": supervisor.last_error}, 503)

    @app.get("/metrics")
    async def scrape() -> Response:
        body, content_type = metrics.render()
        return Response(body, media_type=content_type)

    @app.get("/live", dependencies=guarded)
    async def live() -> JSONResponse:
        return JSONResponse(metrics.live())

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(_PAGE, headers={"Content-Security-Policy": _PAGE_POLICY})

    return app


def _model_card(settings: ServeSettings, created: int) -> dict[str, Any]:
    return {
        "id": settings.model_name,
        "object": "model",
        "created": created,
        "owned_by": "effinfer",
    }
