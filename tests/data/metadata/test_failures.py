"""Reasons of failures."""

from __future__ import annotations

import pytest

from fewstep.data.metadata.failures import reason_of


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("HTTP Error 404: Not Found", "HTTP 404"),
        ("HTTP Error 503: Service Temporarily Unavailable", "HTTP 503"),
        ("HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite loop.", "HTTP 302"),
        ("<urlopen error [Errno 111] Connection refused>", "connection refused"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("_ssl.c:989: The handshake operation timed out", "timeout"),
        ("<urlopen error [Errno 110] Connection timed out>", "timeout"),
        ("fewstep: not complete after 60 s", "timeout"),
        ("fewstep: larger than 67108864 bytes", "too many bytes"),
        ("<urlopen error [Errno -2] Name or service not known>", "unknown host"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "name servers do not answer"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed (_ssl.c:1006)>",
         "certificate refused"),
        ("<urlopen error [SSL: UNRECOGNIZED_NAME] tlsv1 unrecognized name (_ssl.c:1006)>", "TLS error"),
        ("[Errno 104] Connection reset by peer", "connection lost"),
        ("Remote end closed connection without response", "connection lost"),
        ("IncompleteRead(1021 bytes read, 24000 more expected)", "connection lost"),
        ("<urlopen error [Errno 113] No route to host>", "no route"),
        ("unknown url type: 'pictures/1.jpg'", "bad address"),
        ("'ascii' codec can't encode characters in position 5-6: ordinal not in range(128)", "bad address"),
        ("got more than 65536 bytes when reading header line", "not an HTTP answer"),
        ("Use of image disallowed by X-Robots-Tag directive", "opted out by X-Robots-Tag"),
        ("image too small", "image too small"),
        ("image area too large", "image area too large"),
        ("OpenCV(4.14.0) /io/opencv/modules/imgcodecs/src/loadsave.cpp:79: error: (-215:Assertion failed) pixels <= "
         "CV_IO_MAX_IMAGE_PIXELS in function 'validateInputImageSize'\n", "image area too large"),
        ("OpenCV(4.14.0) /io/opencv/loadsave.cpp:1310: error: (-215:Assertion failed) !buf.empty()", "broken picture"),
        ("Image decoding error", "broken picture"),
        ("aspect ratio too large", "aspect ratio too large"),
        ("", "other error"),
        ("something that nobody has seen", "other error"),
    ],
)  # fmt: skip
def test_texts_of_errors_become_few_reasons(text: str, reason: str) -> None:
    assert reason_of(text) == reason
