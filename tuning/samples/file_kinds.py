"""Recognises data files that are not JSON: tables, archives, git-lfs pointers, other encodings.

Each message says what to do. In the commands FILE and NEW stand for the user's own file names.
"""

import codecs
import csv
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
    b"\xd0\xcf\x11\xe0": "is an old Office file (.xls, .doc); save it as CSV (UTF-8) and convert that to JSON lines",
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
BYTE_ORDER_MARKS = {  # the longer ones first: those of UTF-32 begin like those of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
COLUMNS = {"instruction", "input", "output", "prompt", "response", "question", "answer", "query", "content", "summary"}
COLUMNS |= {"text", "label", "completion", "history", "system", "target", "source", "context"}
TO_JSON_LINES = (
    "python -c 'import csv, json, sys; [print(json.dumps(row, ensure_ascii=False)) for row in csv.DictReader("
    'open(sys.argv[1], encoding="ENCODING", newline=""), delimiter="DELIMITER")]\' FILE > NEW'
)


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
    """What a file is, by its first HEAD bytes, if it certainly holds no rows of JSON in UTF-8."""
    if not head:
        return "is empty: it holds no rows"
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return f"is {encoding} text, not UTF-8; {iconv(encoding)}"
    if encoding := _wide_encoding(head):
        return f"is {encoding} text without a byte order mark, not UTF-8; {iconv(encoding)}"
    for magic, problem in MAGIC.items():
        if head.startswith(magic):
            return problem
    if head.startswith(b"PK\x03\x04"):
        if b"xl/" in head:
            return "is an Excel workbook; save it as CSV (UTF-8) and convert that to JSON lines"
        return "is a zip archive (or an Office file); unpack it"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it"
    if not head.strip(b"\0"):
        return "holds NUL bytes alone, as a file whose writing was cut off"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if re.match(rb"<(!doctype|html|head|body|\?xml|!--)", text, re.IGNORECASE):
        return "is a web page or XML, not data; was the page saved instead of the file behind it?"
    return _table_problem(text)


def iconv(encoding: str) -> str:
    """How to convert a file to UTF-8."""
    return f"convert it: iconv -f {encoding} -t UTF-8 FILE > NEW"


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a byte order mark: the first characters, of JSON or a header, are ASCII."""
    for pattern, encoding in (
        (rb"[\t\n\r -~]\0\0\0[\t\n\r -~]?", "UTF-32LE"),
        (rb"\0\0\0[\t\n\r -~]", "UTF-32BE"),
        (rb"[\t\n\r -~]\0[\t\n\r -~]\0", "UTF-16LE"),
        (rb"\0[\t\n\r -~]\0[\t\n\r -~]", "UTF-16BE"),
    ):
        if re.match(pattern, head):
            return encoding
    return None


def _table_problem(text: bytes) -> str | None:
    """The problem if a text is a table: its first line has names of columns that data usually has."""
    line = text.split(b"\n", 1)[0].rstrip(b"\r").decode("utf-8", "replace")
    if line.startswith(("{", "[")):
        return None
    for delimiter, shown, kind in ((",", ",", "a CSV table"), ("\t", "\\t", "a TSV table"), (";", ";", "a CSV table")):
        try:
            columns = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            continue
        if len(columns) >= 2 and COLUMNS.intersection(column.strip().casefold() for column in columns):
            encoding = likely_encoding(text) if not is_utf8(text) else "utf-8-sig"
            command = TO_JSON_LINES.replace("ENCODING", encoding or "utf-8-sig").replace("DELIMITER", shown)
            names = ", ".join(columns)
            return f"is {kind} with the columns {names[:200]!r}, not JSON; convert it: {command}"
    return None


# Encodings


def is_utf8(text: bytes) -> bool:
    """Whether bytes are UTF-8, except that the last character may be incomplete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text)
    except UnicodeDecodeError:
        return False
    return True


def likely_encoding(text: bytes) -> str | None:
    """The encoding of a text that is not UTF-8, by its name in iconv; None if that is unclear.

    In Chinese text of GB18030 nearly all bytes above 127 come in pairs of two of them (the characters of GB2312); in
    Big5 many second bytes are lower; in Western European text such bytes stand alone.
    """
    high = len(re.findall(rb"[\x80-\xff]", text))
    dropped = len(text) - len(text.decode("utf-8", "ignore").encode())
    # what decodes may be chance for characters of two bytes, as those of GB18030 are, hardly for longer ones
    wide = sum(map(len, re.findall(rb"[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}", text)))
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
