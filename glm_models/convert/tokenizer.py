"""tokenizer.json and tokenizer_config.json, made of a SentencePiece model, for transformers without remote code."""

import os
import re

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..checkpoint import CheckpointError, write_json
from .template import TEMPLATES

SPACE = "▁"  # SentencePiece writes spaces so
NORMAL, USER_DEFINED, BPE = 1, 4, 2  # of SentencePiece's ModelProto: types of pieces, type of model
# As added tokens these two would be cut out of any text: "people", "sophisticated".
RENAMED = {"sop": "<sop>", "eop": "<eop>"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def native_token(token: str) -> str:
    """The name that a special token has in tokenizer.json."""
    return RENAMED.get(token, token)


def read_vocabulary(vocabulary: str) -> sentencepiece_model_pb2.ModelProto:
    """The content of a SentencePiece model's file.

    Raises:
        CheckpointError: the model is of a kind that ChatGLM2 and ChatGLM3 do not have.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    with open(vocabulary, "rb") as file:
        proto.ParseFromString(file.read())
    rules = proto.normalizer_spec
    known = proto.trainer_spec.model_type == BPE and rules.add_dummy_prefix and rules.escape_whitespaces
    known = known and {"<unk>", "</s>"} <= {piece.piece for piece in proto.pieces}
    if not known or rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        raise CheckpointError(f"{vocabulary} is of another kind than those of ChatGLM2 and ChatGLM3; not converted")
    return proto


def check_names(tokenizer) -> None:
    """Check that a family's special tokens have names of their own outside the official code too.

    Args:
        tokenizer: of ChatGLM2 or ChatGLM3, from this project.

    Raises:
        CheckpointError: a piece has the name of one.
    """
    for token in tokenizer.special_tokens:
        if tokenizer.sp_model.PieceToId(native_token(token)) != tokenizer.sp_model.unk_id():
            raise CheckpointError(f"{tokenizer.vocab_file} has a piece {native_token(token)}; not converted")


def make_tokenizer(vocabulary: str, special_tokens: tuple[str, ...]) -> Tokenizer:
    """A tokenizer that gives the ids of a SentencePiece model, and the family's special tokens after its pieces.

    Args:
        vocabulary: the SentencePiece model's file.
        special_tokens: names in the order of their ids.

    Raises:
        CheckpointError: see read_vocabulary.
    """
    proto = read_vocabulary(vocabulary)
    own = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.piece: i for i, piece in enumerate(proto.pieces)},
            merges=_merges(proto.pieces),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
            ignore_merges=any(len(piece) > 1 for piece in own),  # no merges lead to them
        )
    )
    # Metaspace would take a text's own first space for the one that SentencePiece puts before every text
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(" ", SPACE), normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2)]
    )
    steps = [pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=False)]
    if own:  # never part of a longer piece
        whole = "|".join(re.escape(piece) for piece in sorted(own, key=len, reverse=True))
        steps.append(pre_tokenizers.Split(Regex(whole), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    # not <s>, which nothing needs: every one of them is cut out of the texts of users, too
    names = ["<unk>", "</s>", *map(native_token, special_tokens)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    begin = ["[gMASK]", "<sop>"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A"],
        pair=[*begin, "$A", "$B:1"],
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in begin],
    )
    return tokenizer


def _merges(pieces) -> list[tuple[str, str]]:
    """Pairs of pieces that make another one, the best first: SentencePiece ranks by the score of what comes out."""
    normal = {piece.piece: (-piece.score, i) for i, piece in enumerate(pieces) if piece.type == NORMAL}
    ranked = []
    for piece, rank in normal.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in normal and piece[cut:] in normal:
                ranked.append((rank, piece[:cut], piece[cut:]))
    return [(left, right) for _, left, right in sorted(ranked)]


def tokenizer_config(mode: str, special_tokens: tuple[str, ...], length: int) -> dict:
    """The content of tokenizer_config.json.

    Args:
        length: the longest sequence of the model.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that transformers 4 and 5 know
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "eos_token": "</s>",
        "additional_special_tokens": [native_token(token) for token in special_tokens],
    }


def write_tokenizer(folder: str, tokenizer, length: int) -> None:
    """Write TOKENIZER_FILES.

    Args:
        tokenizer: of ChatGLM2 or ChatGLM3, from this project.
        length: the longest sequence of the model.

    Raises:
        CheckpointError: see read_vocabulary and check_names.
    """
    special = tokenizer.special_tokens
    check_names(tokenizer)
    make_tokenizer(tokenizer.vocab_file, special).save(os.path.join(folder, TOKENIZER_FILES[0]))
    write_json(os.path.join(folder, TOKENIZER_FILES[1]), tokenizer_config(tokenizer.mode, special, length))
    with open(os.path.join(folder, TOKENIZER_FILES[2]), "w", encoding="utf-8") as file:
        file.write(TEMPLATES[tokenizer.mode])
