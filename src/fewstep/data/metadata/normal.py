"""Normal forms of addresses and captions, and the 64-bit digests by which rows are compared, dealt and drawn."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

# Parameters that say how large or in which form a picture is sent, or who sent the visitor; not which picture it is.
_SAME_PICTURE = (
    r"(?:utm_\w+|fbclid|gclid|resize|fit|crop|strip|ssl|auto|fm|format)=[^&]*|"
    # These are also names of what is looked for, of hashes and numbers of pictures: only as a number of pixels or so.
    r"(?:w|h|q|size|zoom|scale|width|height|quality|dpr|imwidth|imheight|maxwidth|maxheight)=\d{1,4}(?:\.\d+)?(?:px)?"
)


def normal_urls(urls: pa.Array) -> pa.Array:
    """Return the addresses in a form that is equal for addresses of one picture.

    Without scheme, ``www.``, fragment, the parameters of image servers for size and form (w, width, resize, quality …)
    and of trackers (utm_…), WordPress's size before the extension (``-300x200.jpg``), and a slash at the end; the host
    in lower case.
    """
    urls = pc.replace_substring_regex(pc.utf8_trim_whitespace(urls), r"(?i)^[a-z]+:/*(www\.)?", "")
    urls = pc.replace_substring_regex(urls, r"#.*$", "")
    urls = pc.replace_substring_regex(urls, r"(?i)-\d{2,4}x\d{2,4}(\.[a-z]{3,4})(\?|$)", r"\1\2")
    urls = pc.replace_substring_regex(urls, rf"(?i)([?&])(?:(?:{_SAME_PICTURE})(?:&|$))+", r"\1")
    urls = pc.replace_substring_regex(urls, r"[?&/]+$", "")
    host = pc.utf8_lower(pc.replace_substring_regex(urls, r"[/?].*$", ""))
    rest = pc.replace_substring_regex(urls, r"^[^/?]*", "")
    return pc.binary_join_element_wise(host, rest, pa.scalar("", host.type))


def normal_captions(captions: pa.Array) -> pa.Array:
    """Return the captions in NFKC and lower case, with one space for whatever is neither letter, mark nor digit."""
    captions = pc.utf8_lower(pc.utf8_normalize(captions, form="NFKC"))
    return pc.utf8_trim(pc.replace_substring_regex(captions, r"[^\p{L}\p{M}\p{N}]+", " "), " ")


def digests(texts: pa.Array, *, seed: int, purpose: str) -> npt.NDArray[np.uint64]:
    """Return a 64-bit digest of each text (N,), the same on every machine: BLAKE2b with seed and purpose as its key.

    Among two billion different texts one pair is expected to share a digest with probability 0.1.
    """
    key = hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=16).digest()
    found = b"".join(
        hashlib.blake2b(text, digest_size=8, key=key).digest() for text in pc.cast(texts, pa.binary()).to_pylist()
    )
    return np.frombuffer(found, dtype=">u8").astype(np.uint64)
