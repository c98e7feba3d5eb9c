"""Samples out of any range of a tar's bytes, without the bytes before it.

A shard is read in pieces. A piece begins anywhere, so it looks for the first header at or after its start, and leaves
out the sample which that one belongs to: that may have begun before. In return a piece goes on beyond its end, through
the whole sample that the first header at or after its end belongs to. So the pieces of a tar together give each sample
once, whatever their bounds. Names are read as webdataset reads them: a sample is a run of files with the same name up
to the first dot.

Headers are read here and not by tarfile because that takes as long for a member as the decoding of cached latents.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from webdataset.tariterators import base_plus_ext

from fewstep.data.sample import Bytes

BLOCK = tarfile.BLOCKSIZE
#: Bytes before its start that a piece reads: a header of the pax format stands before the one that it belongs to.
LEAD_BYTES = 4 * BLOCK

#: A file may be larger than a piece, and the next header far; but a ruined shard is not searched to its end each time.
_LONGEST_SEARCH_BYTES = 1 << 26
_LONGEST_PADDING_BYTES = 1 << 20
_FILES = b"0\x007"
_NO_DATA = b"123456"
_MAGIC = re.compile(b"ustar")
_ZERO_BLOCK = bytes(BLOCK)


@dataclass(slots=True)
class RawSample:
    """A sample as it lies in its shard.

    Attributes:
        key: name up to the first dot.
        members: bytes by extension, in lower case; views of the piece that was read.
        offset: byte of the shard at which the header of its first member lies.
        start, end: bytes of the shard that hold all of it: from the first header, long ones before that included, to
            the padding of its last member.
        doubled: name of a second member with the extension of one before it; nothing where all differ.
    """

    key: str
    members: dict[str, memoryview]
    offset: int
    start: int
    end: int
    doubled: str = ""


@dataclass
class PieceContent:
    """What a piece holds.

    Attributes:
        samples: the samples that belong to it.
        needed: byte of the shard up to which it must be read to be whole; 0: it is.
        damage: what is wrong with the tar here, or None.
        lost_bytes: length of what could not be read.
        is_v7: its headers have no mark by which those of other pieces could be found.
    """

    samples: list[RawSample] = field(default_factory=list)
    needed: int = 0
    damage: str | None = None
    lost_bytes: int = 0
    is_v7: bool = False


def parse_piece(data: Bytes, *, base: int, start: int, end: int, size_bytes: int) -> PieceContent:
    """Return the samples of a piece of a tar.

    Damage does not end a piece: it goes on at the next header; the samples beside the damage count only if they have
    the members that others have.

    Args:
        data: bytes of the tar from `base` on, to `end` and better further.
        base: a multiple of 512, `LEAD_BYTES` before start where the tar has so many.
        start, end: of the piece, in bytes of the tar; end == size_bytes for the last one.
        size_bytes: of the whole tar.
    """
    return _Parser(data, base=base, start=start, end=end, size_bytes=size_bytes).run()


def parse_sample(data: Bytes, *, start: int) -> RawSample | None:
    """Return the one sample whose bytes, from its `start` to its `end`, these are; None if they are not."""
    tar = bytes(data) + 2 * _ZERO_BLOCK
    content = parse_piece(tar, base=0, start=0, end=len(tar), size_bytes=len(tar))
    if len(content.samples) != 1 or content.damage is not None:
        return None
    (sample,) = content.samples
    return replace(sample, offset=start + sample.offset, start=start + sample.start, end=start + sample.end)


@dataclass(slots=True)
class _Member:
    offset: int
    name: str
    data: memoryview
    start: int
    end: int


class _NeedMoreError(Exception):
    def __init__(self, until: int) -> None:
        super().__init__(until)
        self.until = until


class _Parser:
    def __init__(self, data: Bytes, *, base: int, start: int, end: int, size_bytes: int) -> None:
        self._data, self._view = data, memoryview(data)
        self._base, self._start, self._end, self._size_bytes = base, start, end, size_bytes
        self._content = PieceContent()
        self._usual: frozenset[str] | None = None
        self._doubtful = False  # the sample being read may have lost members to damage

    def run(self) -> PieceContent:
        try:
            self._group()
        except _NeedMoreError as more:
            return PieceContent(needed=min(more.until, self._size_bytes))
        return self._content

    def _group(self) -> None:
        skipped: str | None = None
        last: str | None = None
        current: RawSample | None = None
        skipping = self._start > 0
        for member in self._members():
            if member is None:  # damage
                self._close(current, whole=False)
                current, self._doubtful = None, True
                continue
            key, extension = base_plus_ext(member.name)
            if key is None or member.offset < self._start:
                continue
            if last is None and member.offset >= self._end:
                last = key
            elif last is not None and key != last:
                self._close(current, whole=True)
                return
            if skipping:
                skipped = key if skipped is None else skipped
                if key == skipped:
                    continue
                skipping = False
            if current is None or current.key != key:
                self._close(current, whole=True)
                current = RawSample(key, {}, member.offset, member.start, member.end)
            extension = extension.lower()
            if extension in current.members:
                current.doubled = current.doubled or member.name
            else:
                current.members[extension] = member.data
            current.end = member.end
        self._close(current, whole=self._content.damage is None)

    def _close(self, sample: RawSample | None, *, whole: bool) -> None:
        if sample is None:
            return
        names = frozenset(sample.members)
        if whole and not self._doubtful:
            self._usual = self._usual or names
        elif names != self._usual:
            self._doubtful = self._doubtful and not whole
            return
        self._doubtful = False
        self._content.samples.append(sample)

    def _members(self) -> Iterator[_Member | None]:
        """The files in turn, and None for damage."""
        at = 0 if self._base == 0 else self._next_header(0)
        name: str | None = None
        size: int | None = None
        first: int | None = None  # where the long headers of the next member begin
        while at is not None:
            if self._base + at >= self._size_bytes:
                self._damaged("no end mark", 0)
                yield None
                return
            block = self._take(at, at + BLOCK)
            if block is None:
                self._damaged("it ends in a header", self._length() - at)
                yield None
                return
            header = bytes(block)
            zeros = header == _ZERO_BLOCK
            if zeros and self._only_zeros(at):
                return
            if zeros or not _is_header(header):
                begun, what = at, "zeros" if zeros else "no header"
                at = self._next_header(at + BLOCK)
                self._damaged(f"{what} at byte {self._base + begun}", (self._length() if at is None else at) - begun)
                yield None
                name = size = first = None
                continue
            kind = header[156:157]
            length = 0 if kind in _NO_DATA else _number(header[124:136]) if size is None else size
            begin = at + BLOCK
            if kind in _FILES:
                self._content.is_v7 = self._content.is_v7 or not _MAGIC.match(header, 257)
                body = self._take(begin, begin + length)
                if body is None:
                    self._damaged("it ends in a file", self._length() - at)
                    yield None
                    return
                begun, until = at if first is None else first, begin + (length + BLOCK - 1) // BLOCK * BLOCK
                name = _name(header) if name is None else name
                yield _Member(self._base + at, name, body, self._base + begun, self._base + until)
                name = size = first = None
            elif kind in b"xL":
                first = at if first is None else first
                body = self._take(begin, begin + length)
                if body is None:
                    self._damaged("it ends in a header", self._length() - at)
                    yield None
                    return
                if kind == b"L":
                    name = _text(bytes(body))
                else:
                    try:
                        name, size = _pax(bytes(body), name, size)
                    except ValueError:
                        self._damaged(f"a damaged header at byte {self._base + at}", 0)
                        yield None
                        name = size = first = None
            else:
                name = size = first = None
            at = begin + (length + BLOCK - 1) // BLOCK * BLOCK

    def _only_zeros(self, at: int) -> bool:
        """Whether nothing but the end mark and its padding follows; a hole in the tar looks the same at first."""
        if self._length() - at > _LONGEST_PADDING_BYTES:
            return False
        rest = self._take(at, self._length())
        return rest is not None and not any(bytes(rest))

    def _length(self) -> int:
        return self._size_bytes - self._base

    def _take(self, begin: int, end: int) -> memoryview | None:
        """Bytes of the data; None where the tar ends before."""
        if end <= len(self._data):
            return self._view[begin:end]
        if self._base + len(self._data) < self._size_bytes:
            # A header that claims more than the tar has does not make anybody read to its end for nothing.
            if self._base + end > self._size_bytes:
                return None
            raise _NeedMoreError(self._base + end + BLOCK)
        return None

    def _next_header(self, at: int) -> int | None:
        """Where the next header lies; None when there is none, as behind the last file, or none near."""
        while True:
            found = _MAGIC.search(self._view, at + 257)
            if found is None:
                read = self._base + len(self._data)
                if read < min(self._size_bytes, self._end + _LONGEST_SEARCH_BYTES):
                    raise _NeedMoreError(read + len(self._data))
                return None
            at = found.start() - 257
            if at % BLOCK == 0 and at + BLOCK <= len(self._data) and _is_header(bytes(self._view[at : at + BLOCK])):
                return at
            at += 1

    def _damaged(self, what: str, lost_bytes: int) -> None:
        self._content.damage = self._content.damage or what
        self._content.lost_bytes += lost_bytes


def _is_header(block: bytes) -> bool:
    checksum = block[148:156]
    try:
        wanted = _number(checksum)
    except ValueError:
        return False
    # The sum of all bytes, with spaces for the checksum's own; Adler-32 has it modulo 65521, far faster than sum.
    return (wanted + 1 + sum(checksum) - 8 * 32) % 65521 == zlib.adler32(block) & 0xFFFF


def _number(raw: bytes) -> int:
    if raw[0] & 0x80:  # GNU's form for files of 8 GiB and more
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    return int(raw.split(b"\0", 1)[0].strip() or b"0", 8)


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", errors="surrogateescape")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[345] and header[257:263] == b"ustar\0":
        name = f"{_text(header[345:500])}/{name}"
    return name


def _pax(records: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Name and size out of records "LENGTH KEY=VALUE\\n"; most are of the time alone."""
    at = 0
    while at < len(records) and (space := records.find(b" ", at)) > 0:
        length = int(records[at:space])
        if length <= space - at or at + length > len(records):
            raise ValueError(f"a record of {length} bytes")
        key, _, value = records[space + 1 : at + length - 1].partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", errors="surrogateescape")
        elif key == b"size":
            size = int(value)
        at += length
    return name, size
