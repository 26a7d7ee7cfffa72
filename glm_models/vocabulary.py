"""SentencePiece models as files: loading one, and adding pieces to it."""

import re

import sentencepiece

from .checkpoint import CheckpointError, check_download


def load_vocabulary(path: str) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model.

    Raises:
        CheckpointError: the file is not a SentencePiece model, or it is truncated.
    """
    check_download(path)
    with open(path, "rb") as file:
        content = file.read()
    vocabulary = sentencepiece.SentencePieceProcessor()
    try:
        vocabulary.LoadFromSerializedProto(content)
        # A file truncated between two pieces can still be parsed. A complete one ends with the normaliser's settings.
        fields = top_fields(content)
        if NORMALIZER_FIELD not in fields:
            raise RuntimeError("its end is missing")
    except (RuntimeError, IndexError) as error:
        first = content[:300].split(b"\n")[0]
        if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?", first):
            reason = "it looks like the vocabulary of GLM-4, which is not supported"
        else:
            reason = f"broken or another file, download it again ({' '.join(str(error).split())[:200]})"
        raise CheckpointError(f"{path} is not a SentencePiece model: {reason}") from None
    return vocabulary


NORMALIZER_FIELD = 3  # of SentencePiece's ModelProto, whose fields are in the order of their numbers


def top_fields(content: bytes) -> set[int]:
    """Numbers of the fields of a protocol buffer that has only fields of bytes.

    Raises:
        IndexError: the content ends within a field.
    """
    fields, place = set(), 0
    while place < len(content):
        fields.add(content[place] >> 3)
        length = shift = 0
        place += 1
        while True:
            byte = content[place]
            length |= (byte & 127) << shift
            place, shift = place + 1, shift + 7
            if byte < 128:
                break
        place += length
    return fields


# Types of pieces in ModelProto.
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
BYTE_FALLBACK = b"\x12\x03\x98\x02\x01"  # trainer_spec { byte_fallback: true }


def add_pieces(vocabulary: sentencepiece.SentencePieceProcessor, controls: tuple, texts: tuple) -> None:
    """Append pieces: control tokens, pieces that match their text in any input, and bytes if there are none.

    A repeated field of a protocol buffer is extended by appending bytes.
    """
    pieces = [(name, CONTROL) for name in controls] + [(name, USER_DEFINED) for name in texts]
    content = vocabulary.serialized_model_proto()
    if not any(map(vocabulary.IsByte, range(vocabulary.GetPieceSize()))):
        pieces += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
        content += BYTE_FALLBACK
    for name, kind in pieces:
        field = b"\x0a" + bytes([len(name)]) + name.encode() + b"\x15" + bytes(4) + b"\x18" + bytes([kind])
        content += b"\x0a" + bytes([len(field)]) + field  # name, score 0, kind
    vocabulary.LoadFromSerializedProto(content)
