"""Base class of the three tokenizers: SentencePiece, and the one function that makes a prompt.

There are two ways from text to ids, and the difference matters:

- `encode_text` (used for prompts, training samples and chat): the text of users stays text. A literal `<sop>` or
  `<|user|>` in a sentence is encoded in ordinary pieces, never as the special token.
- `tokenizer(text)`, the call of transformers, for tools that use it; for ChatGLM-6B it recognises special tokens in any
  text, as all tokenizers of transformers do.
"""

import functools
import hashlib
import os
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece
from transformers import PreTrainedTokenizer

from .checkpoint import CheckpointError, read_json
from .histories import encode_fitting
from .identify import check_family
from .tools import NO_TOOLS
from .vocabulary import load_vocabulary

# Part of `fingerprint`: increase it when a code change gives other ids for the same text.
ENCODING = 1

SEAM = 8  # characters at each end of a query that decide how its pieces join those of the template


NO_IDS = np.zeros(0, np.int32)


class Prompt(NamedTuple):
    """The tokens before an answer, in three int32 arrays [tokens]; many prompts share the first and the last."""

    begin: np.ndarray
    text: np.ndarray
    end: np.ndarray
    cut: bool  # the end of the query was dropped because of max_src_len
    dropped: int = 0  # turns of a conversation that were dropped from its beginning because of max_src_len

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate((self.begin, self.text, self.end))


class Encoded(NamedTuple):
    """One sample of a dialogue, of any length.

    dialogue: index of the dialogue in the list that was encoded.
    parts: its ids in order, int32 [tokens] each; arrays may be shared between samples.
    length: total tokens of all parts.
    spans: the learnt pieces, as (first position, position after the last); at least one piece.
    cut: the end of the question before the first learnt piece was dropped because of max_src_len.
    dropped: how many turns were dropped from the beginning of the conversation.
    """

    dialogue: int
    parts: tuple[np.ndarray, ...]
    length: int
    spans: tuple[tuple[int, int], ...]
    cut: bool
    dropped: int = 0


class ChatGLMTokenizerBase(PreTrainedTokenizer):
    """A SentencePiece vocabulary with the special tokens of one family.

    Subclasses give `mode`, the special ids, `stop_token_ids`, `_encode_each` or `encode_prompts`, and some of them
    `encode_texts`, `encode_answers`, `encode_dialogues` and `encode_questions`. The methods for one text call those for
    many.
    """

    mode: str  # the key in MODE, for messages
    padding_side = "left"

    def __init__(self, vocab_file, **kwargs):
        self.vocab_file = os.fspath(vocab_file)
        self.sp_model = load_vocabulary(self.vocab_file)
        self._complete_vocabulary()
        # false in the official configs: decode() must not remove spaces before punctuation
        kwargs["clean_up_tokenization_spaces"] = False
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """The tokenizer of a folder, from its vocabulary and from what `read_settings` takes of tokenizer_config.json.

        All other settings are fixed, as in the official code, whatever the json files say; above all left padding.

        Raises:
            CheckpointError: no such folder, of another family (the --mode that fits is named), or a file is broken.
        """
        folder = os.fspath(pretrained_model_name_or_path)
        check_family(folder, cls.mode, need=("vocabulary",))
        path = os.path.join(folder, "tokenizer_config.json")
        try:
            settings = cls.read_settings(read_json(path) if os.path.isfile(path) else {})
        except CheckpointError as error:
            raise CheckpointError(str(error) if path in str(error) else f"{path}: {error}") from None
        vocabulary = os.path.join(folder, cls.vocab_files_names["vocab_file"])
        return cls(vocabulary, name_or_path=folder, **settings | kwargs)

    # What a family defines

    @classmethod
    def read_settings(cls, settings: dict) -> dict:
        """The settings in tokenizer_config.json that change ids, as arguments of this class.

        Raises:
            CheckpointError: a key asks for something that this class does not support.
        """
        return {}

    def _complete_vocabulary(self) -> None:
        """Add pieces that the vocabulary file lacks and that the official code adds when it loads the file."""

    def config_ids(self) -> dict[str, set[int]]:
        """For every key of config.json with token ids: the ids that it may have."""
        raise NotImplementedError

    def encode_texts(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """Ids of plain texts, int32 [tokens] each: no special tokens added, none recognised.

        Args:
            threads: of SentencePiece.

        Raises:
            ValueError: a text has an unpaired surrogate, which is not valid Unicode.
        """
        return self._encode_pieces(texts, threads)

    def encode_prompts(
        self, queries: list[str], history=None, max_src_len: int | None = None, threads: int = 1
    ) -> list[Prompt]:
        """Everything the model sees before it answers: template, history, query, special tokens.

        Args:
            queries: the user's texts, one per prompt.
            history: earlier turns, in the form of the family's official chat; the same for all queries.
            max_src_len: maximum ids of a prompt without the special tokens at its ends; the end of the query is
                dropped to fit, never a token of the template.
            threads: of SentencePiece.

        Raises:
            ValueError: a template alone is longer than max_src_len; the history has another form; or as
                `encode_texts`.
        """
        return self._encode_each(queries, [history] * len(queries), max_src_len, threads)

    def _encode_each(
        self, queries: list[str], histories: list, max_src_len: int | None = None, threads: int = 1
    ) -> list[Prompt]:
        """As `encode_prompts`, but each query has its own history."""
        raise NotImplementedError

    def encode_dialogues(
        self, dialogues: Sequence, max_src_len: int | None = None, threads: int = 1, max_len: int | None = None
    ) -> list[Encoded]:
        """Samples of conversations, in order: one for each learnt answer, with the earlier turns as its history.

        Of a sample that is longer than a limit, as few turns as necessary are dropped from the beginning of its
        history, before its question or its answer is cut.

        Args:
            dialogues: each has `messages` (with role, content, metadata and learn) and `tools` (JSON, or None).
            max_src_len, threads: as for `encode_prompts`.
            max_len: maximum ids of a sample; it only drops turns, and cuts nothing.

        Raises:
            ValueError: the family has no such messages; or as `encode_prompts`.
        """
        numbers, queries, histories, answers = [], [], [], []
        for number, dialogue in enumerate(dialogues):
            pairs = self._pairs(dialogue)
            for turn, message in enumerate(dialogue.messages[1::2]):
                if message.learn:
                    numbers.append(number)
                    queries.append(pairs[turn][0])
                    histories.append(pairs[:turn])
                    answers.append(pairs[turn][1])
        end = np.array([self.eos_token_id], np.int32)
        encoded = []
        answer_ids = self.encode_answers(answers, threads)
        rooms = None if max_len is None else [max_len - len(answer) - 1 for answer in answer_ids]
        prompts = encode_fitting(self, queries, histories, max_src_len, rooms, threads)
        for number, (before, text, after, cut, dropped), answer in zip(numbers, prompts, answer_ids, strict=True):
            start = len(before) + len(text) + len(after)
            length = start + len(answer) + 1
            encoded.append(
                Encoded(number, (before, text, after, answer, end), length, ((start, length),), cut, dropped)
            )
        return encoded

    def encode_questions(self, dialogues: Sequence, max_src_len: int | None = None, threads: int = 1) -> list[Prompt]:
        """Prompts for the answer to the last message of each dialogue. Arguments and errors: see `encode_dialogues`."""
        pairs = [self._pairs(dialogue) for dialogue in dialogues]
        queries = [dialogue.messages[-1].content for dialogue in dialogues]
        return encode_fitting(self, queries, pairs, max_src_len, None, threads)

    def dialogue_problem(self, dialogue) -> str | None:
        """Why this family cannot take a conversation, and the way out; None if it can."""
        roles = [message.role for message in dialogue.messages]
        way_out = "train --mode glm3, which has them"
        has_tools = dialogue.tools not in (None, NO_TOOLS)
        if has_tools or any(message.metadata or message.role == "observation" for message in dialogue.messages):
            return f"{self.mode} has no tools: {way_out}"
        if "system" in roles:
            return f"{self.mode} has no system message: write it into the first question, or {way_out}"
        if roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
            return f"a conversation of {self.mode} is user and assistant in turn, not {', '.join(roles[:8])}"
        return None

    def _pairs(self, dialogue) -> list[tuple[str, str]]:
        """Question and answer of each complete turn.

        Raises:
            ValueError: see `dialogue_problem`.
        """
        if dialogue.is_single_turn:
            question, answer = dialogue.messages
            return [(question.content, answer.content)]
        if problem := self.dialogue_problem(dialogue):
            raise ValueError(problem)
        texts = [message.content for message in dialogue.messages]
        return list(zip(texts[::2], texts[1::2], strict=False))

    @functools.cached_property
    def line_break_id(self) -> int | None:
        """The id of a line break in a prompt, if no piece joins one to other characters; else None.

        Then the ids of a line do not depend on the lines around it.
        """
        pieces = list(map(self.sp_model.IdToPiece, range(self.sp_model.GetPieceSize())))
        name = self._to_pieces_text("\n")
        holders = [piece for piece in pieces if name in piece]
        if holders == [name] or (not holders and "<0x0A>" in pieces):
            return self._convert_token_to_id(holders[0] if holders else "<0x0A>")
        return None

    def _to_pieces_text(self, text: str) -> str:
        """A text as SentencePiece gets it."""
        return text

    def encode_answers(self, answers: list[str], threads: int = 1) -> list[np.ndarray]:
        """Ids of answers as they follow the prompt, int32 [tokens] each, without the end token."""
        return self.encode_texts(answers, threads)

    def encode_text(self, text: str) -> list[int]:
        """`encode_texts` of one text."""
        return self.encode_texts([text])[0].tolist()

    def encode_prompt(self, query: str, history=None, max_src_len: int | None = None, **kwargs) -> list[int]:
        """Ids of `encode_prompts` of one query."""
        return self.encode_prompts([query], history, max_src_len, **kwargs)[0].ids.tolist()

    def encode_answer(self, answer: str) -> list[int]:
        """`encode_answers` of one answer."""
        return self.encode_answers([answer])[0].tolist()

    def fingerprint(self) -> str:
        """A hash that differs between tokenizers that give different ids for the same training data."""
        with open(self.vocab_file, "rb") as file:
            vocabulary = hashlib.file_digest(file, "sha256").hexdigest()
        # an empty prompt holds the template and the special tokens
        parts = (ENCODING, sentencepiece.__version__, self.mode, vocabulary, self.encode_prompt(""), self.eos_token_id)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def context_length(self, ids: list[int]) -> int:
        """Number of first tokens of a sample that are seen by all its tokens."""
        return 0

    def decode_answer(self, ids: list[int]) -> str:
        """The text of an answer, from the ids of `encode_answer`."""
        return self.decode(ids)

    @property
    def special_texts(self) -> list[str]:
        """Special tokens as text. In a user's text they are ordinary letters, or are not kept."""
        return sorted({*self._control_texts, self.unk_token})

    @functools.cached_property
    def _control_texts(self) -> list[str]:
        """The vocabulary's control tokens; to find them takes tens of milliseconds."""
        model = self.sp_model
        return [model.IdToPiece(i) for i in range(model.GetPieceSize()) if model.IsControl(i)]

    def lost_characters(self, characters: str) -> set[str]:
        """Those of the characters that leave no trace in the ids of a text, or only the unknown token."""
        plain, *encoded = (ids.tolist() for ids in self.encode_texts(["ab", *(f"a{one}b" for one in characters)]))
        unknown, pairs = self.unk_token_id, zip(characters, encoded, strict=True)
        return {one for one, ids in pairs if unknown in ids or ids == plain}

    def changed_characters(self, characters: str) -> dict[str, str]:
        """Those of some characters that come back from the ids of a text as others, with what they become.

        A vocabulary may normalise: ChatGLM-6B's makes ASCII of full-width letters, digits and punctuation.
        """
        encoded = self.encode_texts([f"a{one}b" for one in characters])
        back = {one: self.decode(ids)[1:-1] for one, ids in zip(characters, encoded, strict=True)}
        return {one: text for one, text in back.items() if text not in ("", one) and self.unk_token not in text}

    def as_written(self, answers: list[str]) -> list[str]:
        """Answers as the model can write them, with every character as the vocabulary normalises it.

        An answer with a character that the vocabulary cannot represent is left unchanged: the model cannot write it.
        """
        encoded, unknown = self.encode_answers(answers), self.unk_token_id
        pairs = zip(answers, encoded, strict=True)
        return [answer if unknown in ids else self.decode_answer(ids.tolist()) for answer, ids in pairs]

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end a generated answer."""
        return [self.eos_token_id]

    # What transformers expects of a tokenizer

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.PieceToId(token)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.DecodePieces(tokens)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id for every id, special tokens included."""
        return {self._convert_id_to_token(i): i for i in range(self.vocab_size)}

    def save_vocabulary(self, save_directory, filename_prefix=None) -> tuple[str]:
        name = (filename_prefix + "-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        path = os.path.join(save_directory, name)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)

    def _encode_pieces(self, texts: list[str], threads: int) -> list[np.ndarray]:
        try:
            return self.sp_model.encode(texts, out_type="numpy", num_threads=threads)
        except TypeError:  # SentencePiece does not say which text, nor what is wrong
            raise ValueError("a text has an unpaired surrogate, which is not valid Unicode") from None

    def _fit_queries(
        self, templates: list[tuple[str, str]], queries: list[str], max_src_len: int | None, threads: int
    ) -> list[tuple[np.ndarray, bool]]:
        """Ids of before + query + after, with the end of `query` dropped to fit max_src_len, and whether it was.

        The whole string is encoded at once because, as in the official chat, a piece may span template and query. A
        piece that holds any character of the template counts as template.

        Args:
            templates: the texts before and after each query.
        """
        fitted = []
        find = functools.cache(self._find_template)  # many queries have the same beginning and end
        texts = [before + query + after for (before, after), query in zip(templates, queries, strict=True)]
        encoded = self._encode_pieces(texts, threads)
        for (before, after), query, ids in zip(templates, queries, encoded, strict=True):
            cut = max_src_len is not None and len(ids) > max_src_len
            if cut:
                head, tail = self._template_pieces(before, query, after, ids, find)
                room = max_src_len - head - tail
                if room < 0:
                    raise ValueError(
                        f"max_src_len {max_src_len} is less than the {head + tail} ids of the prompt's template"
                    )
                ids = np.concatenate((ids[: head + room], ids[len(ids) - tail :]))
            fitted.append((ids, cut))
        return fitted

    def _template_pieces(self, before: str, query: str, after: str, ids: np.ndarray, find) -> tuple[int, int]:
        """How many of the `ids` of before + query + after hold characters of `before`, and how many of `after`.

        SentencePiece is slow to tell the place of each piece, so for a long query the middle is left out. The result is
        the same if the pieces at both seams are.
        """
        if not before and not after:
            return 0, 0
        if len(query) > 2 * SEAM:
            head, tail, known = find(before, query[:SEAM] + query[-SEAM:], after)
            # compare some pieces of the query too, but none near the gap, where the text differs
            more = min(SEAM // 2, (len(known) - head - tail) // 4)
            ends = ((0, head + more), (-tail - more, None))
            if more and all(known[a:b] == ids[a:b].tolist() for a, b in ends):
                return head, tail
        return find(before, query, after)[:2]

    def _find_template(self, before: str, query: str, after: str) -> tuple[int, int, list[int]]:
        """Number of pieces with characters of `before` and of `after`, and the ids of all."""
        pieces = self.sp_model.encode(before + query + after, out_type="proto").pieces  # begin and end count bytes
        query_start, query_end = (len(part.encode()) for part in (before, before + query))
        # (of a character encoded in bytes all pieces except the last are empty and at its beginning)
        head = bisect_left(pieces, query_start, key=lambda piece: piece.begin) if before else 0
        tail = (
            bisect_right(pieces, query_end, key=lambda piece: max(piece.begin + 1, piece.end)) if after else len(pieces)
        )
        return head, len(pieces) - tail, [piece.id for piece in pieces]
