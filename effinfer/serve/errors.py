"""Errors as OpenAI's API words them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """What a client is told: a status, a message, and the field at fault when there is one."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON that says so."""
        kind = _TYPES.get(self.status, "server_error")
        return {
            "error": {
                "message": _encodable(self.message),
                "type": kind,
                "param": None if self.param is None else _encodable(self.param),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return JSONResponse(self.body(), self.status, headers)


def _encodable(text: str) -> str:
    """``text`` without lone surrogates, which JSON can bring in and UTF-8 can't take out."""
    return text.encode("utf-8", "replace").decode()


def bad_field(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, f"{param}: {message}", param, code)


def named_field(error: Exception) -> ApiError:
    """A 400 for an error of the engine's, whose message is "what: field must ..."."""
    message = str(error).partition(": ")[2]
    return ApiError(400, message, message.split(" ", 1)[0])


def _first_problem(error: RequestValidationError) -> ApiError:
    found = error.errors()[0]
    # Pydantic puts the kind of a union's member behind the field: the field itself is enough.
    where = [str(part) for part in found["loc"] if part != "body"]
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found.get('ctx', {}).get('error', '')}")
    message = "no such field" if found["type"] == "extra_forbidden" else found["msg"]
    message = message.removeprefix("Value error, ")
    if not where:
        return ApiError(400, f"the body: {message}")
    return ApiError(400, f"{'.'.join(where)}: {message}", where[0])


def install_handlers(app: FastAPI) -> None:
    """Make every error of ``app`` come out this way."""

    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _first_problem(error).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        what = f"{request.method} {request.url.path}: " if error.status_code in (404, 405) else ""
        return ApiError(error.status_code, f"{what}{error.detail}").response()
