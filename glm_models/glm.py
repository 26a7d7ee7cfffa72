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

from .attention import LayerInputs, attention_forward, default_attention_mask, split_heads, token_places, visible_mask
from .chat import OFFICIAL, ChatMixin
from .checkpoint import CheckpointError
from .config import ChatGLMConfigBase
from .families import FAMILIES
from .histories import check_pairs
from .messages import short_repr
from .modeling import Block, LanguageModelMixin, PrefixEncoder, TransformerMixin, select_tokens
from .ops import OutputLayer, TiledMLP, fork, join, linear_of_recomputed
from .pretrained import ChatGLMPreTrainedModel
from .rotary import apply_rotary, glm_angles, glm_pairs
from .tokenization import NO_IDS, ChatGLMTokenizerBase, Prompt
from .vocabulary import add_pieces


class GLMConfig(ChatGLMConfigBase):
    """config.json of ChatGLM-6B; the defaults are the official values."""

    model_type = "chatglm"
    attribute_map = {"num_hidden_layers": "num_layers", "max_position_embeddings": "max_sequence_length"}
    title: ClassVar[str] = FAMILIES["glm"].title

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    # In all releases these are bos - 4 and bos - 3; the config of the first (vocab_size 150528) does not contain them.
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    bos_token_id: int = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = None  # 3, or 20003 with 20000 ids of image tokens before those of text
    use_cache: bool = True
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    prefix_dropout: float = 0.1
    quantization_bit: int = 0
    # Not in the official config, which means true (the default of transformers 4, but not of transformers 5).
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
                f"hidden_size {self.hidden_size} is not a multiple of {pairs} x num_attention_heads "
                f"{self.num_attention_heads}"
            )


MAXIMUM_IMAGES = 10**6


class GLMTokenizer(ChatGLMTokenizerBase):
    """ice_text.model, with `num_image_tokens` ids (20000 in the oldest checkpoints) before those of text.

    The ice_text.model of the first release has only the pieces of text. The official code of that time added special
    tokens, pieces for white space and bytes when it loaded the file, and so does this class; later files contain them.
    """

    mode = "glm"
    vocab_files_names = {"vocab_file": FAMILIES["glm"].vocabulary}
    model_input_names = ["input_ids", "attention_mask"]
    MAX_BLANKS = 80  # the longest run of spaces that has a piece of its own
    special_tokens = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
    names = {"bos": "<sop>", "eos": "<eop>", "mask": "[MASK]", "pad": "<pad>", "unk": "<unk>", "gmask": "[gMASK]"}
    more_names = {"gmask_token": "[gMASK]", "end_token": "</s>"}  # not known to transformers

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
                raise CheckpointError(
                    f"{key} {short_repr(settings[key])} is not supported; the official value is false"
                )
        for name, right in (cls.names | {"end": "</s>"}).items():
            given = settings.get(f"{name}_token")
            token = given.get("content") if isinstance(given, dict) else given
            # in the first release the token that ends an answer is called eop_token
            if token not in (None, right) and not (name == "eos" and settings.get("eop_token") == right):
                raise CheckpointError(f"{name}_token {short_repr(token)} is not supported, only {right}")
        images = settings.get("num_image_tokens", 20000)
        if type(images) is not int or not 0 <= images <= MAXIMUM_IMAGES:
            raise CheckpointError(
                f"num_image_tokens {short_repr(images)} must be a whole number up to {MAXIMUM_IMAGES}"
            )
        return {"num_image_tokens": images}

    def _complete_vocabulary(self) -> None:
        known = [self.sp_model.PieceToId(token) != self.sp_model.unk_id() for token in self.special_tokens]
        if all(known):
            return
        if any(known):
            missing = self.special_tokens[known.index(False)]
            raise CheckpointError(f"{self.vocab_file} has no {missing}: it is not the vocabulary of {GLMConfig.title}")
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
        """Replace white space that SentencePiece would lose by the vocabulary's pieces for it."""
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
        # the pieces for white space would become white space
        blanks = (f"<|blank_{count}|>" for count in range(2, self.MAX_BLANKS + 1))
        return sorted({*super().special_texts, self.end_token, "<n>", "<|tab|>", *blanks})

    def encode_texts(self, texts, threads=1) -> list[np.ndarray]:
        texts = [self._to_pieces_text(text) for text in texts]
        return [ids + self.num_image_tokens for ids in self._encode_pieces(texts, threads)]

    def _encode_each(self, queries, histories, max_src_len=None, threads=1) -> list[Prompt]:
        templates = [
            tuple(map(self._to_pieces_text, self._template(history))) if history else ("", "") for history in histories
        ]
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
        """The official chat: the first question has no template, later ones have numbered rounds before them."""
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
        if index >= self.vocab_size:  # an unused row of the padded embedding
            return ""
        return self.sp_model.IdToPiece(index - self.num_image_tokens)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        drop = {self.pad_token, ""}
        pieces = [t for t in tokens if t not in drop and not t.startswith("<image_")]
        return self._from_pieces_text(super().convert_tokens_to_string(pieces))

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        ids = list(token_ids_0) + [self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else ids + list(token_ids_1) + [self.eos_token_id]


class GLMAttention(nn.Module):
    is_causal = False  # the context is seen in both directions: only the mask tells who sees whom

    def __init__(self, config: GLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.pairs = functools.partial(glm_pairs, config=config)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        mixed = apply_rotary(self.query_key_value(hidden_states), inputs.rotation, self.pairs)
        q, k, v = split_heads(mixed, 3 * self.head_dim).chunk(3, dim=-1)
        return self.dense(select_tokens(attention_forward(self, q, k, v, inputs), inputs.keep_positions))


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
        return linear_of_recomputed(gelu, self.dense_4h_to_h, hidden_states)


class GLMBlock(Block):
    """Both residual connections add the normalised tensor, scaled by alpha = sqrt(2 * num_layers)."""

    def __init__(self, config: GLMConfig, layer_idx: int):
        super().__init__()
        self.alpha = math.sqrt(2 * config.num_layers)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = GLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = GLMMLP(config)

    def get_attention(self):
        return self.attention

    def forward(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        normed, skip = fork(self.input_layernorm(hidden_states), self.alpha)
        attended = self.attention(normed, inputs)
        hidden_states = join(attended, select_tokens(skip, inputs.keep_positions), self.alpha)
        normed, skip = fork(self.post_attention_layernorm(hidden_states), self.alpha)
        return join(self.mlp(normed, self.gradient_checkpointing), skip, self.alpha)


class GLMPreTrainedModel(ChatGLMPreTrainedModel):
    mode = "glm"
    config_class = GLMConfig
    config: GLMConfig
    _no_split_modules = ["GLMBlock"]


class GLMModel(TransformerMixin, GLMPreTrainedModel):
    """The transformer without the output layer."""

    last_norm_in_hidden_states = True

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
        """Index of the `<sop>` that ends the context of each row: [batch]; the tokens before it are seen by all tokens.

        It is the `<sop>` after [gMASK], which ends every prompt; else (a prompt with [MASK]) the first `<sop>`. Without
        any, the whole row is context, except for padding on the right.
        """
        sop = input_ids == self.config.bos_token_id
        after_gmask = F.pad(input_ids[:, :-1] == self.config.gmask_token_id, (1, 0)) & sop
        sop = torch.where(after_gmask.any(1, keepdim=True), after_gmask, sop)
        pad = input_ids == (-1 if self.config.pad_token_id is None else self.config.pad_token_id)
        length = input_ids.shape[1] - pad.flip(1).long().cumprod(1).sum(1)
        return torch.where(sop.any(1), sop.int().argmax(1), length)

    def position_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Position ids of each row: [batch, 2, tokens], or [batch, 1, tokens] without position_encoding_2d.

        The first axis counts the context and then stays at the index of the mask token; the second counts the answer
        from 1. Padding on the left is not counted.
        """
        config = self.config
        pad = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)  # on the left; on the right it changes no position
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

    @property
    def blocks(self):
        return self.layers

    @property
    def last_norm(self):
        return self.final_layernorm

    def rotary_angles(self, position_ids):
        return glm_angles(self.config, position_ids)

    def segment_positions(self, input_ids, segments):
        # one sample below the other, padded on the right, which changes no position
        number, place = token_places(segments, input_ids.device)
        rows = input_ids.new_full((len(segments), max(s.tokens for s in segments)), self.config.pad_token_id)
        rows[number, place] = input_ids[0]
        return self.position_ids(rows, torch.ones_like(rows))[number, :, place].t()[None]

    def default_mask(self, input_ids, cached):
        return default_attention_mask(input_ids, self.config.pad_token_id, cached)

    def default_positions(self, input_ids, attention_mask, cached):
        if cached:
            raise ValueError("with a cache that is not empty, ChatGLM-6B needs position_ids [batch, 2, tokens]")
        return self.position_ids(input_ids, attention_mask)

    def visible_mask(self, input_ids, attention_mask, cached, prefix, dtype):
        # with a cache, input_ids are answer tokens, which see all tokens before them; else they include the context
        context = None if cached else self.context_lengths(input_ids)
        return visible_mask(input_ids.shape[1], attention_mask, self.config, dtype, prefix=prefix, context=context)


class GLMForConditionalGeneration(ChatMixin, LanguageModelMixin, GLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its output layer, loss, `generate`, `chat` and `stream_chat`."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}
    chat_defaults: ClassVar[dict] = {"max_length": 2048, "top_p": 0.7, "temperature": 0.95}

    def __init__(self, config: GLMConfig):
        super().__init__(config)
        self.transformer = GLMModel(config)
        self.lm_head = OutputLayer(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        # the only place that knows all ids, cached or not, and so can compute the positions of later tokens
        mask = attention_mask if attention_mask is not None else torch.ones_like(input_ids)
        kwargs["position_ids"] = self.transformer.position_ids(input_ids, mask)
        return super().prepare_inputs_for_generation(input_ids, attention_mask=mask, **kwargs)

    def official_buffers(self) -> dict[str, torch.Tensor]:
        """Tensors that this model computes and official files contain: exported for the official code."""
        dim = self.config.hidden_size // self.config.num_attention_heads // (1 + self.config.position_encoding_2d)
        inv_freq = (1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim)).half()
        return {
            f"transformer.layers.{i}.attention.rotary_emb.inv_freq": inv_freq for i in range(self.config.num_layers)
        }

    @classmethod
    def worst_case_sample(cls, config, max_len, max_src_len):
        ids, _ = super().worst_case_sample(config, max_len, max_src_len)
        # a prompt ends with these two; the tokens before the last are context
        ids[max(0, max_src_len - 2) : max_src_len] = [config.gmask_token_id, config.bos_token_id]
        return ids, max_src_len - 1

    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        max_length: int | None = OFFICIAL,
        do_sample: bool = True,
        top_p: float = OFFICIAL,
        temperature: float = OFFICIAL,
        logits_processor=None,
        **kwargs,
    ):
        """See ChatMixin; but no cache of an earlier turn, whose tokens have not seen the context that follows them."""
        if refused := {"past_key_values", "return_past_key_values"} & kwargs.keys():
            raise ValueError(f"{min(refused)}: ChatGLM-6B cannot continue from the cache of an earlier turn")
        return super().stream_chat(
            tokenizer, query, history, None, max_length, do_sample, top_p, temperature, logits_processor, **kwargs
        )

    @staticmethod
    def process_response(response: str) -> str:
        """The official clean-up: white space at both ends, the training date, full-width punctuation after Chinese."""
        response = response.strip().replace("[[训练时间]]", "2023年")
        for half, full in (",，", "!！", ":：", ";；", "?？"):
            half = re.escape(half)
            response = re.sub(rf"([\u4e00-\u9fff]){half}", rf"\1{full}", response)
            response = re.sub(rf"{half}([\u4e00-\u9fff])", rf"{full}\1", response)
        return response
