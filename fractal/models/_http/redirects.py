"""Where an endpoint may send a request on to: nowhere that its user has not chosen."""

from __future__ import annotations

import httpx2

from fractal.errors import ConnectionFailed
from fractal.models._http.connecting import PORTS

__all__ = ["redirected", "sends_on"]

MOST_REDIRECTS = 5
"""Times that one request is sent on."""

_SAME_REQUEST = (307, 308)  # the other ones turn it into a GET without a body
_MADE_ANEW = (b"host", b"content-length", b"transfer-encoding")


def sends_on(status: int, has_location: bool) -> bool:
    """Whether an answer is a redirect."""
    return 300 <= status < 400 and has_location


def redirected(request: httpx2.Request, status: int, location: str, times: int) -> httpx2.Request:
    """The request, for the address that a redirect names.

    Args:
        request: The request as it was sent.
        status: HTTP status of the answer.
        location: Its header Location.
        times: How often it has been sent on.

    Returns:
        The request without its body.

    Raises:
        ConnectionFailed: The address is of another origin, or of no use, or the request would be another one.
    """
    try:
        url = request.url.join(location)
    except (httpx2.InvalidURL, ValueError):  # those of hosts are among the latter
        raise _refusal(status, "an address that cannot be used", "see what answers at the base URL") from None
    where = f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"
    if not _is_same_origin(request.url, url):
        raise _refusal(status, where, "the conversation is not sent there: if it is right, give it as base_url")
    if status not in _SAME_REQUEST:
        raise _refusal(status, where, "that would be another request: see what answers at the base URL")
    if times >= MOST_REDIRECTS:
        raise _refusal(status, where, f"it has been sent on {times} times")
    headers = [header for header in request.headers.raw if header[0].lower() not in _MADE_ANEW]
    return httpx2.Request(request.method, url, headers=headers, extensions=request.extensions)


def _is_same_origin(old: httpx2.URL, new: httpx2.URL) -> bool:
    if old.raw_host != new.raw_host:
        return False
    if (old.scheme, new.scheme) == ("http", "https"):
        return True
    return (old.scheme, _port(old)) == (new.scheme, _port(new))


def _port(url: httpx2.URL) -> int | None:
    return url.port or PORTS.get(url.scheme)


def _refusal(status: int, where: str, why: str) -> ConnectionFailed:
    fault = ConnectionFailed(f"the endpoint answers HTTP {status} and sends on to {where}: {why}", status=status)
    fault.retryable = False
    return fault
