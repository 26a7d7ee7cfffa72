"""The bytes of a data file as UTF-8: unpacked from gzip, bzip2 or xz, and recoded from UTF-16 or GB18030; all of it
piece by piece, so that a file of any size, also one that is small only as long as it is packed, needs little memory.

Bytes that are no text in the file's encoding are no UTF-8 afterwards either: the line that has them is broken, no
other one.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from tuning.errors import DataError
from tuning.samples.file_kinds import HEAD, file_problem, path_problem

BLOCK = 1 << 20  # bytes read at once
LONGEST = 1 << 28  # maximum bytes of a line, or of a row of an array
SCANNED = 1 << 24  # bytes in which the first ones that are not ASCII are looked for
PACKED = {b"\x1f\x8b": ("gzip", gzip.open), b"BZh": ("bzip2", bz2.open), b"\xfd7zXZ\0": ("xz", lzma.open)}
# characters of UTF-8 with three or four bytes
WIDE = re.compile(rb"[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
# mark at the start of a file -> encoding and length
MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16LE", codecs.BOM_UTF16_BE: "UTF-16BE"}


class TextFile(NamedTuple):
    """An open data file.

    file: its text as UTF-8, without a byte order mark.
    head: the first part of this, about HEAD bytes.
    packing: gzip, bzip2, xz; "" for none.
    encoding: UTF-8, UTF-16LE, UTF-16BE or GB18030.
    """

    file: io.BufferedReader
    head: bytes
    packing: str
    encoding: str

    @property
    def counts_lines(self) -> bool:
        """Whether the bytes of the file have as many line feeds as its text."""
        return not self.packing and not self.encoding.startswith("UTF-16")

    def describe(self) -> list[str]:
        """What is unusual about it, in words."""
        encoding = [] if self.encoding == "UTF-8" else [f"{self.encoding} text"]
        return [self.packing, *encoding] if self.packing else encoding


@contextlib.contextmanager
def open_text(path: str) -> Iterator[TextFile]:
    """Open a data file.

    Raises:
        DataError: it is no file, holds something else than text, or, also later inside the block, cannot be read.
    """
    if problem := path_problem(path):
        raise DataError(f"{path}: {problem}")
    packing = ""
    try:
        with open(path, "rb") as file:
            start = file.read(max(map(len, PACKED)))
        packing, opener = next((how for magic, how in PACKED.items() if start.startswith(magic)), ("", io.FileIO))
        with opener(path, "rb") as unpacked, io.BufferedReader(unpacked, BLOCK) as file:
            head = file.read(HEAD)
            if problem := file_problem(head):
                raise DataError(f"{path} {problem}")
            encoding, mark = _find_encoding(file, head)
            file.seek(mark)
            if encoding == "UTF-8":
                yield TextFile(file, head[mark:], packing, encoding)
            else:
                recoded = io.BufferedReader(_Recoded(file, encoding), BLOCK)
                yield TextFile(recoded, recoded.peek(HEAD)[:HEAD], packing, encoding)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        raise DataError(f"{path}: its {packing} data is cut off or damaged ({error}); get the file again") from None


class _Recoded(io.RawIOBase):
    """A text in another encoding as UTF-8."""

    def __init__(self, file: io.BufferedReader, encoding: str):
        self.file, self.encoding = file, encoding
        errors = "surrogateescape" if encoding == "GB18030" else "surrogatepass"
        self.decoder = codecs.getincrementaldecoder(encoding)(errors)
        self.line = b""  # the start of one that the last block did not end
        self.ready, self.ended = b"", False
        self.given = 0  # bytes

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.given

    def readinto(self, buffer) -> int:
        while not self.ready and not self.ended:
            block = self.file.read(BLOCK)
            self.ended = not block
            text = self._decode_lines(block) if self.encoding == "GB18030" else self._decode(block)
            self.ready = text.encode("utf-8", "surrogatepass")  # no valid UTF-8 where a character is half a pair
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        self.given += size
        return size

    def _decode(self, block: bytes) -> str:
        try:
            return self.decoder.decode(block, self.ended)
        except UnicodeDecodeError:  # the file ends within a character
            return "\udc80"

    def _decode_lines(self, block: bytes) -> str:
        """GB18030; lines that are UTF-8, which would mostly decode as something else, are kept from that."""
        block = self.line + block
        cut = len(block) if self.ended or len(block) > BLOCK + HEAD else block.rfind(b"\n") + 1
        block, self.line = block[:cut], block[cut:]
        parts = []
        for line in block.splitlines(keepends=True) if not block.isascii() else [block]:
            text = self._decode(line)
            parts.append(line.decode("ascii", "surrogateescape") if _is_wide_utf8(line) else text)
        if self.ended:
            parts.append(self._decode(b""))
        return "".join(parts)


def _is_wide_utf8(line: bytes) -> bool:
    """Whether a line is UTF-8 with characters that other encodings would hardly make by chance."""
    return not line.isascii() and is_utf8(line) and len(WIDE.findall(line)) >= 2


def _find_encoding(file: io.BufferedReader, head: bytes) -> tuple[str, int]:
    """The encoding of a file, by its head and, where that is ASCII, what follows; and the bytes of its mark."""
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding, len(mark)
    if encoding := wide_encoding(head):
        return encoding, 0
    block, read = head, len(head)
    while block.isascii() and read < SCANNED and (more := file.read(HEAD)):
        block, read = more, read + len(more)
    return ("GB18030" if is_gb18030(block) else "UTF-8"), 0


def wide_encoding(head: bytes) -> str | None:
    """UTF-16 without a byte order mark: the first characters, of JSON or a header, are ASCII."""
    for pattern, encoding in (
        (rb"[\t\n\r -~]\0[\t\n\r -~]\0", "UTF-16LE"),
        (rb"\0[\t\n\r -~]\0[\t\n\r -~]", "UTF-16BE"),
    ):
        if re.match(pattern, head):
            return encoding
    return None


def is_utf8(text: bytes) -> bool:
    """Whether bytes are UTF-8, except that the last character may be incomplete."""
    return _decodes(text, "utf-8")


def is_gb18030(text: bytes) -> bool:
    """Whether a text is certainly simplified Chinese in GB18030 or GBK; some of its lines may be broken.

    Text in other encodings decodes too, as characters that Chinese text rarely has. The two bytes of its usual ones
    (level 1 of GB2312) begin with B0 to D7, in the order of their sounds, so that each part has its share; Korean text
    of EUC-KR ends at C8, Japanese text of EUC-JP is full of kana, and in Big5 half the characters are none of GB2312.
    """
    lines = [line for line in text.split(b"\n") if not line.isascii()]
    good = [line for line in lines if _decodes(line, "gb18030")]
    if is_utf8(text) or 2 * len(good) < len(lines) or any(map(_is_wide_utf8, lines)):
        return False
    found = "".join(b"".join(good).decode("gb18030", "ignore"))
    characters = [one for one in found if not one.isascii()]
    first = "".join(characters).encode("gb2312", "ignore")[::2]  # the first byte of each
    hanzi = sum(byte >= 0xB0 for byte in first)
    return (
        hanzi >= 10
        and len(first) >= 0.8 * len(characters)
        and sum(0xC9 <= byte <= 0xD7 for byte in first) >= 0.2 * hanzi
        and sum(byte >= 0xD8 for byte in first) <= 0.15 * hanzi
        and sum(byte in (0xA4, 0xA5) for byte in first) <= 0.05 * len(first)
    )


def likely_encoding(text: bytes) -> str | None:
    """The encoding of a text that is not UTF-8, by its name in iconv, as a hint; None if that is unclear.

    In Chinese text of GB18030 nearly all bytes above 127 come in pairs of two of them (the characters of GB2312); in
    Big5 many second bytes are lower; in Western European text such bytes stand alone.
    """
    high = len(re.findall(rb"[\x80-\xff]", text))
    dropped = len(text) - len(text.decode("utf-8", "ignore").encode())
    # what decodes may be chance for characters of two bytes, as those of GB18030 are, hardly for longer ones
    wide = sum(map(len, WIDE.findall(text)))
    if wide >= high / 2 or dropped < high / 4:  # most of it is UTF-8, which is damaged
        return None
    paired = 2 * len(re.findall(rb"[\xa1-\xf7][\xa1-\xfe]", text))
    for encoding, is_likely in (
        ("GB18030", paired >= max(4, 0.8 * high)),
        ("BIG5", paired >= 0.3 * high),
        ("SHIFT_JIS", paired >= 0.3 * high),
    ):
        if is_likely and _decodes(text, encoding):
            return encoding
    return "WINDOWS-1252" if paired < 0.3 * high and _decodes(text, "windows-1252") else None


def _decodes(text: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(text)  # the last character may be incomplete
    except UnicodeDecodeError:
        return False
    return True
