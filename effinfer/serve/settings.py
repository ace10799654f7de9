"""What a server is told once, when it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeSettings:
    """Limits and identity of a server.

    Attributes:
        model_name: what ``/v1/models`` lists and requests must name.
        api_key: what ``Authorization: Bearer`` must carry on ``/v1`` paths; None asks for none.
        cors_origins: origins that browsers may call from; none by default.
        max_body_bytes: of a request; more is answered 413.
        max_queued_tokens: prompt and output tokens that admitted, unfinished requests may add up to;
            more is answered 429.
        max_choices: of one request, prompts times ``n``.
        deadline_s: seconds after which a request ends as "deadline"; a request may ask for less.
        read_timeout_s: seconds that a body may take to arrive; then the answer is 408.
        write_timeout_s: seconds that a client may leave a full buffer unread before its connection
            is cut and its request cancelled.
        drain_s: seconds that admitted requests have to end after SIGTERM; then they are cancelled.
        restart_backoff_s: before the first restart of a broken engine; each further one waits twice
            as long, up to a minute.
    """

    model_name: str
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 1 << 20
    max_queued_tokens: int = 1 << 20
    max_choices: int = 64
    deadline_s: float = 600.0
    read_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    drain_s: float = 30.0
    restart_backoff_s: float = 0.5
