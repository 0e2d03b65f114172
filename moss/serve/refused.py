"""What the service says no to: one exception that becomes an HTTP answer in OpenAI's form."""

from __future__ import annotations

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}


class Refused(Exception):
    """A request that is not done, and why.

    status: of HTTP. code: for programs, such as `invalid_api_key`. param: the field that is wrong. retry_after:
    seconds after which the same request may succeed.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: float = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def to_json(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def missing(what: str) -> Refused:
    """The same answer for what does not exist and for what belongs to others."""
    return Refused(404, f"there is no such {what}", code="not_found")
