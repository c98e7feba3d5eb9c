"""Why a picture could not be had, in few constant words, from the many texts of urllib, OpenCV and img2dataset."""

from __future__ import annotations

import re

#: Reasons that others ask for by name.
BAD_ADDRESS = "bad address"
OPTED_OUT = "opted out by X-Robots-Tag"
TIMEOUT = "timeout"
TOO_MANY_BYTES = "too many bytes"
PRIVATE = "no public address"
BROKEN = "broken picture"
#: img2dataset counted the row and then neither stored it nor said why.
LOST = "lost by img2dataset"
OTHER = "other error"

_HTTP = re.compile(r"HTTP Error (\d{3})\b")

# The first that is found in the text holds; so what is more special comes first.
_REASONS = [
    (re.compile(pattern, re.IGNORECASE), reason)
    for pattern, reason in (
        (r"disallowed by X-Robots-Tag", OPTED_OUT),
        (r"fewstep: .* is no public address", PRIVATE),
        (r"fewstep: larger than", TOO_MANY_BYTES),
        (r"timed out|fewstep: not complete", TIMEOUT),
        (r"image too small", "image too small"),
        (r"image area too large|CV_IO_MAX_IMAGE_(PIXELS|WIDTH|HEIGHT)", "image area too large"),
        (r"aspect ratio too large", "aspect ratio too large"),
        (r"image decoding error|OpenCV\(", BROKEN),
        (r"certificate", "certificate refused"),
        (r"\bSSL\b|_ssl\.c|\bTLS", "TLS error"),
        (r"connection refused", "connection refused"),
        (r"temporary failure in name resolution", "name servers do not answer"),
        (r"name or service not known|no address associated|nodename nor servname|getaddrinfo|name does not resolve",
         "unknown host"),
        (r"network is unreachable|no route to host|host is down", "no route"),
        (r"reset by peer|closed connection without|IncompleteRead|broken pipe|software caused connection abort",
         "connection lost"),
        (r"unknown url type|no host given|can't contain control|nonnumeric port|codec can't encode|label empty|"
         r"label too long|invalid ipv6|unknown encoding: idna|'NoneType' object", BAD_ADDRESS),
        (r"got more than \d+ |BadStatusLine|invalid literal for int|^HTTP/|unknown protocol|bad gateway",
         "not an HTTP answer"),
    )
]  # fmt: skip


def reason_of(error: str) -> str:
    """Return the reason that the text of an error tells of; HTTP statuses keep their number, as ``HTTP 404``."""
    status = _HTTP.search(error)
    if status is not None:
        return f"HTTP {status[1]}"
    return next((reason for pattern, reason in _REASONS if pattern.search(error)), OTHER)
