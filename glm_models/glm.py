"""ChatGLM-6B: LayerNorm blocks with scaled residuals, 2-D rotary positions, a bidirectional context before `<sop>`."""

import functools
import itertools
import math
import re
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention import Segment, attend, real_tokens, split_heads, visible_mask
from .chat import ChatMixin
from .checkpoint import CheckpointError, shown
from .config import ChatGLMConfigBase
from .modeling import Block, ChatGLMPreTrainedModel, PrefixEncoder, causal_lm_output, take
from .ops import OutputLayer, TiledMLP, rotary, through
from .tokenization import NO_IDS, ChatGLMTokenizerBase, Prompt, add_pieces, check_pairs


class GLMConfig(ChatGLMConfigBase):
    """config.json of ChatGLM-6B; the defaults are the official values."""

    model_type = "chatglm"
    attribute_map = {"num_hidden_layers": "num_layers", "max_position_embeddings": "max_sequence_length"}
    title: ClassVar[str] = "ChatGLM-6B"
    telling_keys: ClassVar[frozenset] = frozenset(("inner_hidden_size", "max_sequence_length", "position_encoding_2d"))

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    # In all releases these two lie four and three below bos; the first has vocab_size 150528 and names neither of them.
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    bos_token_id: int = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = None  # 3, or 20003 where the ids of 20000 image tokens lie before those of text
    use_cache: bool = True
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    prefix_dropout: float = 0.1
    quantization_bit: int = 0
    # The official config does not say, and means true (transformers 4 tied by default, transformers 5 does not).
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.mask_token_id is None:
            self.mask_token_id = max(0, self.bos_token_id - 4)
        if self.gmask_token_id is None:
            self.gmask_token_id = max(0, self.bos_token_id - 3)
        if self.pad_token_id is None:
            self.pad_token_id = 20003 if self.bos_token_id >= 150000 else 3
        pairs = 4 if self.position_encoding_2d else 2  # each axis rotates pairs
        if self.hidden_size % (self.num_attention_heads * pairs):
            raise CheckpointError(
                f"hidden_size {self.hidden_size} is no multiple of {pairs} x num_attention_heads "
                f"{self.num_attention_heads}"
            )


MOST_IMAGES = 10**6


class GLMTokenizer(ChatGLMTokenizerBase):
    """ice_text.model; `num_image_tokens` ids (20000 in the oldest checkpoints) lie before those of text.

    The ice_text.model of the first release ends with the last piece of text; what later ones have behind it, special
    tokens, pieces for white space and bytes, the official code of that time added while loading, and so it is here.
    """

    mode = "glm"
    code_sign = "ice_text"
    vocab_files_names = {"vocab_file": "ice_text.model"}
    model_input_names = ["input_ids", "attention_mask"]
    MAX_BLANKS = 80  # the longest run of spaces that has a piece of its own
    special_tokens = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
    names = {"bos": "<sop>", "eos": "<eop>", "mask": "[MASK]", "pad": "<pad>", "unk": "<unk>", "gmask": "[gMASK]"}
    more_names = {"gmask_token": "[gMASK]", "end_token": "</s>"}  # that transformers does not know

    def __init__(self, vocab_file, num_image_tokens=20000, **kwargs):
        self.num_image_tokens = num_image_tokens
        for name in ("bos", "eos", "mask", "pad", "unk"):
            kwargs[f"{name}_token"] = self.names[name]
        kwargs["model_specific_special_tokens"] = self.more_names
        super().__init__(vocab_file, **kwargs)
        self.init_kwargs["num_image_tokens"] = num_image_tokens

    @classmethod
    def read_settings(cls, settings: dict) -> dict:
        for key in ("do_lower_case", "remove_space"):
            if settings.get(key):
                raise CheckpointError(f"{key} {shown(settings[key])} is not supported; the official value is false")
        for name, right in (cls.names | {"end": "</s>"}).items():
            given = settings.get(f"{name}_token")
            token = given.get("content") if isinstance(given, dict) else given
            # in the first release eop_token names what ends an answer
            if token not in (None, right) and not (name == "eos" and settings.get("eop_token") == right):
                raise CheckpointError(f"{name}_token {shown(token)} is not supported, only {right}")
        images = settings.get("num_image_tokens", 20000)
        if type(images) is not int or not 0 <= images <= MOST_IMAGES:
            raise CheckpointError(f"num_image_tokens {shown(images)} must be a whole number up to {MOST_IMAGES}")
        return {"num_image_tokens": images}

    def _complete_vocabulary(self) -> None:
        known = [self.sp_model.PieceToId(token) != self.sp_model.unk_id() for token in self.special_tokens]
        if all(known):
            return
        if any(known):
            missing = self.special_tokens[known.index(False)]
            raise CheckpointError(f"{self.vocab_file} has no {missing}: not the vocabulary of {GLMConfig.title}")
        blanks = [f"<|blank_{count}|>" for count in range(2, self.MAX_BLANKS + 1)]
        add_pieces(self.sp_model, self.special_tokens, ("<|tab|>", *blanks))

    def config_ids(self) -> dict[str, set[int]]:
        names = ("bos", "eos", "mask", "gmask", "pad")
        return {f"{name}_token_id": {self._convert_token_to_id(self.names[name])} for name in names}

    @property
    def vocab_size(self) -> int:
        return self.sp_model.GetPieceSize() + self.num_image_tokens

    @property
    def gmask_token_id(self) -> int:
        return self._convert_token_to_id(self.gmask_token)

    def _to_pieces_text(self, text: str) -> str:
        """White space that SentencePiece would lose, written as the vocabulary's own pieces for it."""
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        if "  " not in text:
            return text
        # longest run first: 83 spaces are <|blank_80|><|blank_3|>
        return re.sub(f" {{2,{self.MAX_BLANKS}}}", lambda run: f"<|blank_{len(run[0])}|>", text)

    @staticmethod
    def _from_pieces_text(text: str) -> str:
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda run: " " * int(run[1]), text)

    @property
    def special_texts(self) -> list[str]:
        # the pieces for white space would become it
        blanks = (f"<|blank_{count}|>" for count in range(2, self.MAX_BLANKS + 1))
        return sorted({*super().special_texts, self.end_token, "<n>", "<|tab|>", *blanks})

    def encode_texts(self, texts, threads=1) -> list[np.ndarray]:
        texts = [self._to_pieces_text(text) for text in texts]
        return [ids + self.num_image_tokens for ids in self._encode_pieces(texts, threads)]

    def _encode_each(self, queries, histories, max_src_len=None, threads=1) -> list[Prompt]:
        templates = [tuple(map(self._to_pieces_text, self._template(history))) for history in histories]
        queries = [self._to_pieces_text(query) for query in queries]
        end = np.array([self.gmask_token_id, self.bos_token_id], np.int32)
        return [
            Prompt(NO_IDS, ids + self.num_image_tokens, end, cut)
            for ids, cut in self._fit_queries(templates, queries, max_src_len, threads)
        ]

    def context_length(self, ids: list[int]) -> int:
        # as GLMModel.context_lengths
        end = (self.gmask_token_id, self.bos_token_id)
        ends = (i for i, pair in enumerate(itertools.pairwise(ids), 1) if pair == end)
        return next(ends, ids.index(end[1]) if end[1] in ids else len(ids))

    @staticmethod
    def _template(history) -> tuple[str, str]:
        """The official chat: a first question goes in bare, later ones with numbered rounds before them."""
        if not history:
            return "", ""
        check_pairs(history)
        rounds = "".join(f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(history))
        return f"{rounds}[Round {len(history)}]\n问：", "\n答："

    def build_prompt(self, query: str, history=None) -> str:
        """The official chat prompt as text, before the special tokens.

        Args:
            history: pairs (question, answer).
        """
        before, after = self._template(history)
        return before + query + after

    def _tokenize(self, text: str) -> list[str]:
        return self.sp_model.EncodeAsPieces(self._to_pieces_text(text))

    def _convert_token_to_id(self, token: str) -> int:
        if image := re.fullmatch(r"<image_(\d+)>", token):
            return int(image[1])
        return self.sp_model.PieceToId(token) + self.num_image_tokens

    def _convert_id_to_token(self, index: int) -> str:
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        if index >= self.vocab_size:  # rows of the padded embedding that mean nothing
            return ""
        return self.sp_model.IdToPiece(index - self.num_image_tokens)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        drop = {self.pad_token, ""}
        pieces = [t for t in tokens if t not in drop and not t.startswith("<image_")]
        return self._from_pieces_text(super().convert_tokens_to_string(pieces))

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        ids = list(token_ids_0) + [self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else ids + list(token_ids_1) + [self.eos_token_id]


def rotary_angles(config: GLMConfig, position_ids: torch.Tensor, dtype: torch.dtype):
    """Cosine and sine of the rotary angles.

    The reference rounds the inverse frequencies to float16 once, and the official weights were trained and served so;
    everything after that rounding is float32.

    Args:
        position_ids: [batch, axes, tokens]; 2 axes rotate a half of each head each, 1 axis rotates the whole head.

    Returns:
        cos, sin: [batch, tokens, 1, axes, head_dim / axes / 2], of `dtype`.
    """
    axes = position_ids.shape[1]
    dim = config.hidden_size // config.num_attention_heads // axes
    steps = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32)
    inv_freq = (1.0 / 10000 ** (steps / dim)).half().float()
    angles = position_ids.transpose(1, 2)[:, :, None, :, None] * inv_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the queries and keys of mixed [batch, tokens, heads * 3 * head_dim], laid out head by head [q | k | v].

    Along each axis the first half of its share of a head pairs with the second.
    """
    *_, axes, half = cos.shape
    rotated = mixed.clone()
    old, new = (x.unflatten(-1, (-1, 3, axes, 2, half))[:, :, :, :2] for x in (mixed, rotated))
    (first, second), (new_first, new_second) = old.unbind(-2), new.unbind(-2)
    cos, sin = cos[:, :, None], sin[:, :, None]  # [batch, tokens, 1, 1, axes, half]
    torch.sub(first * cos, second * sin, out=new_first)
    torch.add(second * cos, first * sin, out=new_second)
    return rotated


class GLMAttention(nn.Module):
    is_causal = False  # the context is seen in both directions: the mask says everything

    def __init__(self, config: GLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, angles, mask, prefix=None, cache=None, wanted=None):
        mixed = rotary(self.query_key_value(hidden_states), *angles, rotate)
        q, k, v = split_heads(mixed, 3 * self.head_dim).chunk(3, dim=-1)
        return self.dense(take(attend(self, q, k, v, mask, prefix, cache), wanted))


gelu = functools.partial(F.gelu, approximate="tanh")


class GLMMLP(TiledMLP):
    def __init__(self, config: GLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def transform(self, hidden_states, in_checkpoint):
        hidden_states = self.dense_h_to_4h(hidden_states)
        if in_checkpoint:
            return self.dense_4h_to_h(gelu(hidden_states))
        return through(gelu, self.dense_4h_to_h, hidden_states)


class GLMBlock(Block):
    """Both residuals take the normalised tensor, scaled by alpha = sqrt(2 * num_layers)."""

    def __init__(self, config: GLMConfig, layer_idx: int):
        super().__init__()
        self.alpha = math.sqrt(2 * config.num_layers)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = GLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = GLMMLP(config)

    def forward(self, hidden_states, angles, mask, prefix=None, cache=None, wanted=None):
        normed = self.input_layernorm(hidden_states)
        attended = self.attention(normed, angles, mask, prefix, cache, wanted)
        hidden_states = take(normed, wanted) * self.alpha + attended
        normed = self.post_attention_layernorm(hidden_states)
        return normed * self.alpha + self.mlp(normed, self.gradient_checkpointing)


class GLMPreTrainedModel(ChatGLMPreTrainedModel):
    mode = "glm"
    config_class = GLMConfig
    config: GLMConfig
    _no_split_modules = ["GLMBlock"]


class GLMModel(GLMPreTrainedModel):
    """The transformer without the output layer."""

    def __init__(self, config: GLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        if config.pre_seq_len is not None:
            # [pre_seq_len, hidden] -> hidden -> every layer's key and value
            self.prefix_encoder = PrefixEncoder(
                config, kv_size=config.num_layers * config.hidden_size * 2, embedding_size=config.hidden_size
            )
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def set_input_embeddings(self, value):
        self.word_embeddings = value

    def context_lengths(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Index of the `<sop>` that ends the context, row by row: [batch]; tokens before it are seen by all.

        It is the `<sop>` right after a [gMASK], as every prompt ends; else (a prompt with [MASK] inside) the first one.
        A row without any keeps all its tokens in the context, except for padding on the right.
        """
        sop = input_ids == self.config.bos_token_id
        after_gmask = F.pad(input_ids[:, :-1] == self.config.gmask_token_id, (1, 0)) & sop
        sop = torch.where(after_gmask.any(1, keepdim=True), after_gmask, sop)
        pad = input_ids == (-1 if self.config.pad_token_id is None else self.config.pad_token_id)
        length = input_ids.shape[1] - pad.flip(1).long().cumprod(1).sum(1)
        return torch.where(sop.any(1), sop.int().argmax(1), length)

    def position_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Position ids, row by row: [batch, 2, tokens], or [batch, 1, tokens] without position_encoding_2d.

        Row 0 counts the context and then stays at the index of the mask token; row 1 counts the answer from 1.
        Indices are those of the row without its padding.
        """
        config = self.config
        pad = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)  # on the left; on the right it moves nothing
        sop = self.context_lengths(input_ids)[:, None] - pad
        index = torch.arange(input_ids.shape[1], device=input_ids.device)[None] - pad
        is_gmask, is_mask = (input_ids == i for i in (config.gmask_token_id, config.mask_token_id))
        use_gmask = is_gmask.any(1, keepdim=True)
        mask_index = torch.where(use_gmask, is_gmask, is_mask).int().argmax(1, keepdim=True) - pad
        index = index.clamp(min=0)
        answer = index >= sop
        if not config.position_encoding_2d:
            return torch.where(answer & ~use_gmask, mask_index, index)[:, None]
        return torch.stack((torch.where(answer, mask_index, index), (index - sop + 1).clamp(min=0)), dim=1)

    def forward(
        self,
        input_ids: torch.Tensor,  # [batch, tokens]
        attention_mask: torch.Tensor | None = None,  # [batch, cached + tokens], 1 real, 0 padding
        position_ids: torch.Tensor | None = None,  # [batch, axes, tokens]
        cache: DynamicCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        segments: list[tuple[int, int]] | None = None,  # of the one row there is: tokens, and of them context
        wanted: torch.Tensor | None = None,  # see take
    ) -> BaseModelOutputWithPast:
        cache, cached = self.prepare_cache(cache, use_cache)
        if segments is not None:
            parts = input_ids.split([tokens for tokens, _ in segments], dim=1)
            position_ids = torch.cat([self.position_ids(part, torch.ones_like(part)) for part in parts], dim=2)
        elif attention_mask is None:
            attention_mask = real_tokens(input_ids, self.config.pad_token_id, cached)
        if position_ids is None:
            if cached:
                raise ValueError("with a cache that is not empty, ChatGLM-6B needs position_ids [batch, 2, tokens]")
            position_ids = self.position_ids(input_ids, attention_mask)

        hidden_states = self.word_embeddings(input_ids)
        prefix = self.prefixes(len(segments or input_ids))
        if segments is not None:
            mask = [Segment(*segment) for segment in segments]
        else:
            # an answer token sees what lies before it; only whole prompts have a context to see in both directions
            context = None if cached else self.context_lengths(input_ids)
            mask = visible_mask(
                input_ids.shape[1], attention_mask, self.config, hidden_states.dtype, prefix=prefix, context=context
            )
        angles = rotary_angles(self.config, position_ids, hidden_states.dtype)

        hidden_states, all_hidden_states = self.run_layers(
            self.layers, hidden_states, angles, mask, prefix, cache, output_hidden_states, wanted
        )
        hidden_states = self.final_layernorm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            cache=cache,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
        )


class GLMForConditionalGeneration(ChatMixin, GLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its output layer, loss, `generate`, `chat` and `stream_chat`."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: GLMConfig):
        super().__init__(config)
        self.transformer = GLMModel(config)
        self.lm_head = OutputLayer(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool = False,
        num_items_in_batch: torch.Tensor | float | None = None,
        segments: list[tuple[int, int]] | None = None,
        answer_positions: torch.Tensor | None = None,
        **_,
    ):
        """See `causal_lm_output` for labels and loss; `segments` are the samples of a row that holds several."""
        wanted = None if labels is None or answer_positions is None else answer_positions - 1
        outputs = self.transformer(
            input_ids, attention_mask, position_ids, cache, use_cache, output_hidden_states, segments, wanted
        )
        return causal_lm_output(
            self, outputs, self.lm_head, labels, logits_to_keep, num_items_in_batch, answer_positions
        )

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        # All ids are here, whatever the cache holds: the only place where later positions can be told.
        mask = attention_mask if attention_mask is not None else torch.ones_like(input_ids)
        kwargs["position_ids"] = self.transformer.position_ids(input_ids, mask)
        return super().prepare_inputs_for_generation(input_ids, attention_mask=mask, **kwargs)

    def official_buffers(self) -> dict[str, torch.Tensor]:
        """Tensors that official files hold and this model computes: written on export for the official code."""
        dim = self.config.hidden_size // self.config.num_attention_heads // (1 + self.config.position_encoding_2d)
        inv_freq = (1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim)).half()
        return {
            f"transformer.layers.{i}.attention.rotary_emb.inv_freq": inv_freq for i in range(self.config.num_layers)
        }

    # The official chat.

    def chat(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor=None,
        **kwargs,
    ):
        """Answer one query, as the official model does.

        Returns:
            The answer and a new history, pairs (question, answer); the history passed in stays as it was.
        """
        sampling = self.sampling(do_sample, top_p, temperature)
        return self.reply(
            tokenizer, query, history, max_length, logits_processor, num_beams=num_beams, **sampling, **kwargs
        )

    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        max_length: int = 2048,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor=None,
        **kwargs,
    ):
        """As `chat`, but yields (answer so far, history) after each token."""
        sampling = self.sampling(do_sample, top_p, temperature)
        for response, new_history, _ in self.stream_reply(
            tokenizer, query, history, max_length, logits_processor, **sampling, **kwargs
        ):
            yield response, new_history

    @staticmethod
    def process_response(response: str) -> str:
        """The official clean-up: strip, the training date, full-width punctuation beside Chinese characters."""
        response = response.strip().replace("[[训练时间]]", "2023年")
        for half, full in (",，", "!！", ":：", ";；", "?？"):
            half = re.escape(half)
            response = re.sub(rf"([\u4e00-\u9fff]){half}", rf"\1{full}", response)
            response = re.sub(rf"{half}([\u4e00-\u9fff])", rf"{full}\1", response)
        return response
