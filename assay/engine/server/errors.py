"""Errors in the shape that OpenAI's clients read: {"error": {message, type, param, code}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from assay.engine.server.wire import dumps
from assay.spec.base import NestedError

LONGEST = 400  # characters of a message: it may quote what was sent
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer other than the one that was asked for. param: the field of the body that it is about; retry: seconds
    after which to ask again."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry = status, param, code, retry

    @property
    def body(self) -> dict[str, Any]:
        text = str(self)
        text = text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": text, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {} if self.retry is None else {"retry-after": str(self.retry)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(dumps(self.body), self.status, headers, "application/json")


def unaccepted(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first problem that pydantic found in a body, with the field's name, the accepted values and the one given."""
    item = errors[0]
    loc, message = tuple(item["loc"])[1:], str(item["msg"]).removeprefix("Value error, ")
    cause = item.get("ctx", {}).get("error")
    if isinstance(cause, NestedError):
        loc += cause.loc
    elif item["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {item.get('ctx', {}).get('error', message)}")
    elif item["type"] == "missing":
        message = "missing"
    elif item["type"] != "value_error":
        message = f"{message.partition(' after validation')[0]}, not {item['input']!r}"
    where = ".".join(str(part) for part in loc)
    return ApiError(400, f"{where}: {message}" if where else message, param=str(loc[0]) if loc else None)
