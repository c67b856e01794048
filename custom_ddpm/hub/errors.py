"""Errors of the Hub and of the connection to it, as one line for the user."""

from huggingface_hub.errors import HfHubHTTPError, HTTPError

from ..messages import one_line

# What a failed request can raise: the client's HTTPError (an OSError in some of its versions), a RuntimeError around it
# when files are uploaded from threads, a ValueError when an answer is malformed.
NETWORK_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)

STATUS_REASONS = {
    401: "the token is missing or not accepted (401); log in with `hf auth login` or set HF_TOKEN",
    403: "the token has no write permission there (403); use one that has, or another repository",
    404: "the repository or branch does not exist, or the token has no access to it (404)",
    409: "another push to the repository is in progress (409)",
    412: "another push to the repository is in progress (412)",
    429: "too many requests (429)",
}


class HubError(RuntimeError):
    """The Hub or the connection to it failed.

    The message is one line. For a push it gives the reason, the folder that still holds the pipeline, and the command
    that repeats the push.
    """


def failure_reason(error: BaseException) -> str:
    """The reason of a failed request, in one line and without addresses.

    Args:
        error: one of `NETWORK_ERRORS`; the error that caused it is looked up.
    """
    cause: BaseException = error
    while not isinstance(cause, HfHubHTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, HubError):
        return one_line(cause)
    if not isinstance(cause, HfHubHTTPError):
        return f"the connection to the Hub failed ({type(cause).__name__}: {one_line(cause)})"
    status = cause.response.status_code
    reason = STATUS_REASONS.get(status, f"the Hub reports an internal error ({status})")
    if status < 500 and status not in STATUS_REASONS:
        reason = f"the Hub rejects the request ({status}: {one_line(error)})"
    if seconds := cause.response.headers.get("Retry-After"):
        reason += f"; retry after {seconds} s"
    return reason
