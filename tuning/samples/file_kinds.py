"""Recognises files that hold no rows: archives, git-lfs pointers, pages, encodings that are not read.

Each message says what to do. In the commands FILE and NEW stand for the user's own file names.
"""

import codecs
import os
import re
import stat

HEAD = 1 << 16  # bytes at the start of a file that are inspected
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# First bytes -> kind of file, and what to do
MAGIC = {
    LFS_POINTER: "is a pointer of git-lfs, not the data itself; get that with: git lfs pull",
    b"\x1f\x8b": "is compressed with gzip; unpack it: gzip -dc FILE > NEW",
    b"BZh": "is compressed with bzip2; unpack it: bzip2 -dc FILE > NEW",
    b"\xfd7zXZ\0": "is compressed with xz; unpack it: xz -dc FILE > NEW",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it: zstd -dc FILE > NEW",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive; unpack it",
    b"Rar!": "is a RAR archive; unpack it",
    b"PAR1": "is a Parquet file; convert it: "
    "python -c \"import pandas; pandas.read_parquet('FILE').to_json('NEW', orient='records', lines=True, "
    'force_ascii=False)"',
    b"ARROW1": "is an Arrow file; load it with the datasets package and save it with its to_json",
    b"\xff\xff\xff\xff": "is an Arrow file; load it with the datasets package and save it with its to_json",
    b"\xd0\xcf\x11\xe0": "is an old Office file (.xls, .doc); save it as CSV (UTF-8)",
    b"%PDF": "is a PDF file",
    b"SQLite format 3\0": "is an SQLite database",
    b"\x93NUMPY": "is a NumPy file",
    b"\x89HDF": "is an HDF5 file",
    b"\x89PNG": "is an image",
    b"\xff\xd8\xff": "is an image",
    b"\x80\x02": "is a pickle file, which is not opened, since that can run code",
    b"\x80\x03": "is a pickle file, which is not opened, since that can run code",
    b"\x80\x04": "is a pickle file, which is not opened, since that can run code",
    b"\x80\x05": "is a pickle file, which is not opened, since that can run code",
}


def path_problem(path: str) -> str | None:
    """Why there is no regular file at a path; None if there is one."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    except ValueError:  # a NUL in it
        return "no such file"
    if stat.S_ISDIR(mode):
        return "is a folder; name one file in it"
    if stat.S_ISFIFO(mode):
        return "is a pipe, as <(...) makes one; data is read more than once, so write it to a file first"
    return None if stat.S_ISREG(mode) else "is no regular file"


def file_problem(head: bytes) -> str | None:
    """What a file is, by its first HEAD bytes, if it certainly holds no rows."""
    if not head:
        return "is empty: it holds no rows"
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return f"is UTF-32 text, not UTF-8; {iconv('UTF-32')}"
    for pattern, encoding in ((rb"[\t\n\r -~]\0\0\0[\t\n\r -~]?", "UTF-32LE"), (rb"\0\0\0[\t\n\r -~]", "UTF-32BE")):
        if re.match(pattern, head):
            return f"is {encoding} text without a byte order mark, not UTF-8; {iconv(encoding)}"
    for magic, problem in MAGIC.items():
        if head.startswith(magic):
            return problem
    if head.startswith(b"PK\x03\x04"):
        if b"xl/" in head:
            return "is an Excel workbook; save it as CSV (UTF-8)"
        return "is a zip archive (or an Office file); unpack it"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it"
    if not head.strip(b"\0"):
        return "holds NUL bytes alone, as a file whose writing was cut off"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if re.match(rb"<(!doctype|html|head|body|\?xml|!--)", text, re.IGNORECASE):
        return "is a web page or XML, not data; was the page saved instead of the file behind it?"
    return None


def iconv(encoding: str) -> str:
    """How to convert a file to UTF-8."""
    return f"convert it: iconv -f {encoding} -t UTF-8 FILE > NEW"
