"""What the three tokenizers share: SentencePiece underneath, and the one function that makes a prompt.

Two ways lead from text to ids, and the difference matters:

- `encode_text` (used by prompts, training samples and chat): the text of users stays text. A literal `<sop>` or
  `<|user|>` in somebody's sentence is spelled out in ordinary pieces, never turned into the special token.
- `tokenizer(text)`, the transformers call, kept for tools that use it; for ChatGLM-6B it cuts special tokens out of any
  text, as transformers does everywhere.
"""

import os
import shutil

import sentencepiece
from transformers import PreTrainedTokenizer

from .checkpoint import check_family


class ChatGLMTokenizerBase(PreTrainedTokenizer):
    """A SentencePiece vocabulary with the special tokens of one family.

    Subclasses give `mode`, the special ids, and the four methods that differ: `encode_text`, `encode_prompt`,
    `encode_answer` and `stop_token_ids`.
    """

    mode: str  # the key in MODE, for messages
    padding_side = "left"

    def __init__(self, vocab_file, **kwargs):
        self.vocab_file = os.fspath(vocab_file)
        self.sp_model = sentencepiece.SentencePieceProcessor()
        try:
            self.sp_model.Load(self.vocab_file)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{self.vocab_file} is not a SentencePiece model: {error}") from None
        # The official configs say false; nobody wants decode() to eat spaces before punctuation.
        kwargs["clean_up_tokenization_spaces"] = False
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; a folder of another family is refused with the --mode that fits it."""
        if os.path.isdir(pretrained_model_name_or_path):
            check_family(pretrained_model_name_or_path, cls.mode, need=("vocabulary",))
        # Official folders name remote code in "auto_map"; it is never run, so transformers must not ask about it.
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    # What a family defines.

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text: no special tokens added, none recognised."""
        raise NotImplementedError

    def encode_prompt(self, query: str, history=None, max_src_len: int | None = None) -> list[int]:
        """Everything the model sees before it answers: template, history, query, special tokens.

        Args:
            query: what the user asks.
            history: earlier turns, in the form of the family's official chat.
            max_src_len: most ids for the prompt, not counting the special tokens that frame it; the end of the query
                text is dropped to fit, never a token of the template.

        Raises:
            ValueError: the template alone is longer than max_src_len.
        """
        raise NotImplementedError

    def encode_answer(self, answer: str) -> list[int]:
        """Ids of an answer as the model is to write it after the prompt, without the end token."""
        raise NotImplementedError

    def context_length(self, ids: list[int]) -> int:
        """How many first tokens of a sample are seen by all its tokens, later ones too."""
        return 0

    def decode_answer(self, ids: list[int]) -> str:
        """The answer that `encode_answer` made these ids of."""
        return self.decode(ids)

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end a generated answer."""
        return [self.eos_token_id]

    # What transformers asks of a tokenizer.

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

    def _fit_query(self, before: str, query: str, after: str, max_src_len: int | None) -> list[int]:
        """Ids of before + query + after, encoded as one string, with the end of `query` dropped to fit max_src_len.

        The string is encoded whole because pieces may reach across the seams, as they do in the official chat. A piece
        that holds any character of the template counts as template.
        """
        text = before + query + after
        ids = self.sp_model.encode(text)
        if max_src_len is None or len(ids) <= max_src_len:
            return ids
        pieces = self.sp_model.encode(text, out_type="proto").pieces  # begin and end count bytes
        query_start, query_end = (len(part.encode()) for part in (before, before + query))
        # (of a character spelled in bytes all pieces but the last are empty, and lie at its beginning)
        head = sum(piece.begin < query_start for piece in pieces) if before else 0
        tail = sum(max(piece.begin + 1, piece.end) > query_end for piece in pieces) if after else 0
        room = max_src_len - head - tail
        if room < 0:
            raise ValueError(f"max_src_len {max_src_len} is less than the {head + tail} ids of the prompt's template")
        return ids[: head + room] + ids[len(ids) - tail :]
