"""Which errors of reading may be gone the next time: a busy server, a lost connection."""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Iterator

# 408 Request Timeout, 425 Too Early, 429 Too Many Requests; and all of the server's own.
_STATUSES = frozenset({408, 425, 429, *range(500, 600)})
# By which a store asks for patience, whatever the status that they come with.
_CODES = frozenset(
    {
        "BandwidthLimitExceeded",
        "InternalError",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
    }
)
_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
# package.class of errors that are no OSErrors, by name: what is not installed cannot be imported.
_CLASSES = frozenset(
    {
        "aiohttp.ClientConnectionError",
        "aiohttp.ClientPayloadError",
        "azure.IncompleteReadError",
        "azure.ServiceRequestError",
        "azure.ServiceResponseError",
        "botocore.ConnectionError",
        "botocore.HTTPClientError",
        "botocore.IncompleteReadError",
        "botocore.ResponseParserError",
        "google.TransportError",
        "http.HTTPException",
        "requests.ChunkedEncodingError",
        "requests.ConnectionError",
        "requests.Timeout",
        "urllib3.HTTPError",
    }
)


class UnreachableError(OSError):
    """What should be there did not come, however often it was asked for.

    path: of the file. start, stop: the bytes that were asked for; None where it was its size.
    tries: how often. cause: what went wrong the last time.
    """

    def __init__(
        self, path: str, start: int | None, stop: int | None, tries: int, cause: str
    ) -> None:
        super().__init__(f"{place(path, start, stop)}: not to be had in {tries} tries ({cause})")
        self.path = path
        self.start = start
        self.stop = stop
        self.tries = tries
        self.cause = cause

    def __reduce__(self) -> tuple[type[UnreachableError], tuple[object, ...]]:
        return type(self), (self.path, self.start, self.stop, self.tries, self.cause)


class DeniedError(OSError):
    """What may be there is not to be had from here, and asking again will not change that."""


def place(path: str, start: int | None, stop: int | None) -> str:
    """What was asked for, in words."""
    path = without_secrets(path)
    return f"{path}: its size" if start is None else f"{path}: bytes {start} to {stop}"


def without_secrets(path: str) -> str:
    """A path or URL for messages: without a user's password, and without a signed query."""
    address, _, _ = path.partition("?") if "://" in path else (path, "", "")
    return re.sub(r"(?<=://)[^/@]*@", "", address)


def is_passing(error: BaseException) -> bool:
    """Whether what raised `error` may succeed when it is asked again.

    The kind of the error decides, or the status that a server gave; where it has neither, what it
    was raised from. (fsspec's HTTP has a FileNotFoundError for any failure to ask for a size.)
    """
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict) and response.get("Error", {}).get("Code") in _CODES:
            return True
        if _is_of_passing_kind(link):
            return True
        status = status_of(link)
        if status is not None:
            return status in _STATUSES
    return False


def status_of(error: BaseException) -> int | None:
    """The HTTP status in `error`, as aiohttp, botocore, azure, requests and gcsfs keep it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        owners = (error, response)
        keys = ("status", "status_code", "code")
        found = next((v for o in owners for k in keys if (v := getattr(o, k, None))), None)
    return found if isinstance(found, int) and 100 <= found <= 599 else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, what caused it, and so on."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _is_of_passing_kind(error: BaseException) -> bool:
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    if isinstance(error, (TimeoutError, ConnectionError, socket.gaierror, ssl.SSLError)):
        return True
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        # s3fs makes EIO of what it does not know, and says what that was.
        return error.errno != errno.EIO or error.__cause__ is None
    names = {f"{c.__module__.partition('.')[0]}.{c.__name__}" for c in type(error).__mro__}
    return not names.isdisjoint(_CLASSES)
