"""Samples on disk as flat arrays, memory-mapped: the ids of all of them, their learnt spans, and a record for each.

    header (one JSON object, padded with spaces to HEADER bytes) | ids, int32 | spans, int32 | records, RECORD

A file is named by a key of everything that determines its content. It is written under another name and renamed, and
used only if size and checksum are right. So runs can share files, and files can be deleted whenever no run is starting.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

FORMAT = 5  # part of the key: increase it when the layout changes
HEADER = 4096
RECORD = np.dtype(
    [("end", "<i8"), ("spans_end", "<i8"), ("line", "<i8"), ("learnt", "<i4"), ("cut", "<i4"), ("text", "<i4")]
)
BLOCK = 1 << 20  # bytes read at once
HOUR = 60 * 60  # seconds


class CachedSamples(NamedTuple):
    """An opened file; the arrays are memory-mapped and read-only.

    ids: int32 [tokens].
    spans: int32 [spans, 2], learnt pieces: first position in the sample, and position after the last.
    records: RECORD [samples]: where its ids and its spans end, its line in the data, learnt tokens, what was cut, and
        whether it is a block of plain text (text.FIRST_BLOCK, text.LATER_BLOCK).
    """

    ids: np.ndarray
    spans: np.ndarray
    records: np.ndarray
    counts: dict  # what else the writer counted; JSON values


def default_folder() -> str:
    """The folder for caches of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "chatglm-tuning")


def file_hash(path: str) -> tuple[str, int]:
    """SHA-256 of a file, and its number of line breaks; read block by block."""
    digest, breaks = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            breaks += block.count(b"\n")
    return digest.hexdigest(), breaks


def cache_file(folder: str, *parts, ending: str = "samples") -> str:
    """Path in `folder` for a key of these parts (strings, numbers)."""
    key = hashlib.sha256(repr((FORMAT, *parts)).encode()).hexdigest()
    return os.path.join(folder, f"{key[:32]}.{ending}")


def open_cache(path: str) -> CachedSamples:
    """Map a file.

    Raises:
        ValueError: it is incomplete.
        OSError: it cannot be read.
    """
    header = _read_header(path)
    ids = np.memmap(path, "<i4", "r", HEADER, (header["tokens"],))
    spans = np.memmap(path, "<i4", "r", HEADER + ids.nbytes, (header["spans"], 2))
    # the last ones in the file: `is_cut` of them speaks for all
    records = np.memmap(path, RECORD, "r", HEADER + ids.nbytes + spans.nbytes, (header["samples"],))
    return CachedSamples(ids, spans, records, header["counts"])


def _read_header(path):
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
        raise ValueError(f"{path} is no regular file")
    with open(path, "rb") as file:
        header = json.loads(file.read(HEADER))
    size = HEADER + 4 * header["tokens"] + 8 * header["spans"] + RECORD.itemsize * header["samples"]
    if os.path.getsize(path) != size:
        raise ValueError(f"{path} has {os.path.getsize(path)} bytes instead of {size}")
    return header


def is_whole(path: str, counts: Iterable[str]) -> bool:
    """Whether the file exists, every byte is as it was written, and it has these counts."""
    try:
        header = _read_header(path)
        if header["counts"].keys() != {*counts}:
            return False
        checksum = 0
        with open(path, "rb") as file:
            file.seek(HEADER)
            while block := file.read(BLOCK):
                checksum = zlib.crc32(block, checksum)
        return header.pop("crc32") == _seal(checksum, header)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def is_cut(mapped: np.memmap) -> bool:
    """Whether a file has been truncated since it was mapped: reading beyond its end would kill the process (SIGBUS)."""
    return mapped.base.size() < mapped.offset + mapped.nbytes


def _seal(checksum: int, header: dict) -> int:
    """Checksum of content and header together."""
    return zlib.crc32(json.dumps(header, sort_keys=True).encode(), checksum)


def write_cache(path: str, chunks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], counts: dict) -> None:
    """Write a file atomically: it gets its name once it is complete and on the disk. Memory: one chunk.

    Several processes may write the same file at once; each writes its own, and the last one remains.

    Args:
        chunks: ids, spans and records of some samples; here `end` and `spans_end` count from the start of the chunk,
            and are changed.
        counts: read after the last chunk.

    Raises:
        OSError: it cannot be written.
    """
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    sweep(folder, r"\w+\.(?:samples|shared)")
    with (
        whole_file(path, "xb", opener=_private) as file,
        tempfile.TemporaryFile(dir=folder) as spans_file,
        tempfile.TemporaryFile(dir=folder) as records_file,
    ):
        checksum = tokens = pieces = samples = 0
        file.seek(HEADER)
        for ids, spans, records in chunks:
            content = ids.astype("<i4", copy=False).data
            file.write(content)
            checksum = zlib.crc32(content, checksum)
            records["end"] += tokens
            records["spans_end"] += pieces
            spans_file.write(spans.astype("<i4", copy=False).tobytes())
            records_file.write(records.tobytes())
            tokens, pieces, samples = tokens + len(ids), pieces + len(spans), samples + len(records)
        for tail in (spans_file, records_file):
            tail.seek(0)
            while block := tail.read(BLOCK):
                file.write(block)
                checksum = zlib.crc32(block, checksum)
        header = {"tokens": tokens, "spans": pieces, "samples": samples, "counts": counts}
        header["crc32"] = _seal(checksum, header)
        content = json.dumps(header).encode().ljust(HEADER)
        if len(content) > HEADER:
            raise ValueError(f"a header of {len(content)} bytes does not fit into {HEADER}")
        file.seek(0)
        file.write(content)


@contextlib.contextmanager
def whole_file(path: str, mode: str, **how):
    """A new file to write, which gets its name once it is complete and on the disk. mode and how are `open`'s.

    It is locked while it is written, so that `sweep` can tell it from files that killed writers left behind.
    """
    file = _open_locked(path, mode, how)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
        raise


def _open_locked(path: str, mode: str, how: dict):
    """A new file beside `path`, locked."""
    while True:
        file = open(f"{path}.{_host()}-{uuid.uuid4().hex}.partial", mode, **how)  # noqa: SIM115 closed by whole_file
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):
            return file
        file.close()  # a sweep removed it between open and lock


def _private(path, flags):
    """For `open`: nobody else may read the data."""
    return os.open(path, flags, 0o600)


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def sweep(folder: str, names: str) -> None:
    """Remove what killed writers of `whole_file` left behind.

    A partial file is abandoned when nobody holds its lock. Some network file systems lock within one machine only, so
    files of other machines are removed only after an HOUR without a write.

    Args:
        names: pattern of the names that the files would have got.
    """
    for entry in os.scandir(folder):
        found = re.fullmatch(rf"(?:{names})\.(?:(\w+)-)?\w+\.partial", entry.name)
        if found:
            with contextlib.suppress(OSError):
                mine = found[1] == _host()
                if entry.is_file(follow_symlinks=False) and (mine or entry.stat().st_mtime < time.time() - HOUR):
                    _remove_unlocked(entry.path)


def _remove_unlocked(path: str) -> None:
    """Remove a file unless a process holds its lock. Raises OSError where one does."""
    file = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    finally:
        os.close(file)
