"""ChatGLM2-6B: RMSNorm, grouped key/value heads, rotary on half of each head. ChatGLM3-6B is the same network."""

import functools
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention import Segment, attend, split_heads, visible_mask
from .chat import ChatMixin
from .checkpoint import CheckpointError
from .config import ChatGLMConfigBase
from .modeling import Block, ChatGLMPreTrainedModel, PrefixEncoder, causal_lm_output, take
from .ops import OutputLayer, TiledMLP, rms_norm, rotary, swiglu, through
from .tokenization import NO_IDS, ChatGLMTokenizerBase, Prompt, check_pairs


class ChatGLM2Config(ChatGLMConfigBase):
    """config.json of ChatGLM2-6B; the defaults are the official values."""

    model_type = "chatglm"
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "head_dim": "kv_channels",
        "max_position_embeddings": "seq_length",
    }
    title: ClassVar[str] = "ChatGLM2-6B"
    telling_keys: ClassVar[frozenset] = frozenset(("padded_vocab_size", "ffn_hidden_size", "kv_channels"))

    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    kv_channels: int = 128
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    ffn_hidden_size: int = 13696
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    seq_length: int = 32768
    original_rope: bool = True
    rope_ratio: float = 1.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    fp32_residual_connection: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None  # the official configs have none
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    prefix_dropout: float = 0.1
    quantization_bit: int = 0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    # Two official meanings of rope_ratio. In ChatGLM2-6B-32K positions are divided by it (linear interpolation).
    rope_ratio_scales_base: ClassVar[bool] = False

    # What the network below computes. A config that asks for anything else is refused, not half obeyed.
    only: ClassVar[dict] = {
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "add_bias_linear": False,
        "original_rope": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "fp32_residual_connection": False,
        "tie_word_embeddings": False,
    }

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for key, value in self.only.items():
            if getattr(self, key) != value:
                raise CheckpointError(f"{key} {getattr(self, key)} is not supported, only {value}")
        if self.num_attention_heads % self.num_groups:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of multi_query_group_num "
                f"{self.num_groups}"
            )
        if self.kv_channels % 4:  # pairs of half of each head are rotated
            raise CheckpointError(f"kv_channels {self.kv_channels} is no multiple of 4")

    @property
    def num_groups(self) -> int:
        """Key/value heads."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads


class ChatGLM2Tokenizer(ChatGLMTokenizerBase):
    """tokenizer.model; the special tokens take the ids after its pieces, in the order of `special_tokens`."""

    mode = "glm2"
    code_sign = "build_prompt"
    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    special_tokens = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")

    def __init__(self, vocab_file, **kwargs):
        # Official values, whatever an older transformers wrote into tokenizer_config.json when it re-saved the folder.
        for name in (
            "bos_token",
            "mask_token",
            "cls_token",
            "sep_token",
            "additional_special_tokens",
            "added_tokens_decoder",
        ):
            kwargs.pop(name, None)
        kwargs |= {"unk_token": "<unk>", "pad_token": "<unk>", "eos_token": "</s>"}
        super().__init__(vocab_file, **kwargs)

    def config_ids(self) -> dict[str, set[int]]:
        begins = {self.get_command("<bos>"), self.get_command("sop")}  # nothing reads it
        return {"bos_token_id": begins, "eos_token_id": set(self.stop_token_ids), "pad_token_id": {self.pad_token_id}}

    @property
    def vocab_size(self) -> int:
        return self.sp_model.GetPieceSize() + len(self.special_tokens)

    def get_command(self, token: str) -> int:
        """Id of a special token, also of `<bos>`, `<eos>` and `<pad>`.

        Raises:
            KeyError: the family has no such token.
        """
        if token in self.special_tokens:
            return self.sp_model.GetPieceSize() + self.special_tokens.index(token)
        return {"<bos>": self.sp_model.bos_id(), "<eos>": self.sp_model.eos_id(), "<pad>": self.sp_model.unk_id()}[
            token
        ]

    def get_prefix_tokens(self) -> list[int]:
        """What every prompt begins with."""
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    @property
    def special_texts(self) -> list[str]:
        # `sop` and `eop` are also words
        return sorted({*super().special_texts, *(token for token in self.special_tokens if token[0] in "[<")})

    def _encode_each(self, queries, histories, max_src_len=None, threads=1) -> list[Prompt]:
        templates = [self._template(history) for history in histories]
        begin = np.array(self.get_prefix_tokens(), np.int32)
        return [
            Prompt(begin, ids, NO_IDS, cut) for ids, cut in self._fit_queries(templates, queries, max_src_len, threads)
        ]

    @staticmethod
    def _template(history) -> tuple[str, str]:
        history = history or []
        check_pairs(history)
        rounds = "".join(f"[Round {i}]\n\n问：{q}\n\n答：{a}\n\n" for i, (q, a) in enumerate(history, 1))
        return f"{rounds}[Round {len(history) + 1}]\n\n问：", "\n\n答："

    def build_prompt(self, query: str, history=None) -> str:
        """The official chat prompt as text, before the special tokens.

        Args:
            history: pairs (question, answer).
        """
        before, after = self._template(history)
        return before + query + after

    def tokenize(self, text: str, **kwargs) -> list[str]:
        # Not transformers' own: that cuts `</s>` and `<unk>` out of any text. Here text stays text.
        return self._tokenize(text)

    def _tokenize(self, text: str) -> list[str]:
        return self.sp_model.EncodeAsPieces(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_command(token) if token in self.special_tokens else super()._convert_token_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        if index < self.sp_model.GetPieceSize():
            return self.sp_model.IdToPiece(index)
        # ids past the special tokens are rows of the padded embedding that mean nothing
        return self.special_tokens[index - self.sp_model.GetPieceSize()] if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text; control tokens have none, and neither have this family's special tokens."""
        return super().convert_tokens_to_string([t for t in tokens if t not in self._silent_tokens])

    @property
    def _silent_tokens(self) -> set[str]:
        return {"<unk>", "<s>", "</s>", "", *self.special_tokens}

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        ids = self.get_prefix_tokens() + list(token_ids_0)
        return ids if token_ids_1 is None else ids + list(token_ids_1) + [self.get_command("<eos>")]

    def _pad(self, encoded_inputs, *args, **kwargs):
        """Adds position ids that start at 0 on the first real token."""
        padded = super()._pad(encoded_inputs, *args, **kwargs)
        if "attention_mask" in padded:
            seen = 0
            padded["position_ids"] = [max(0, (seen := seen + real) - 1) for real in padded["attention_mask"]]
        return padded


class RMSNorm(nn.Module):
    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.layernorm_epsilon

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rotary_frequencies(config: ChatGLM2Config, base: float = 10000) -> torch.Tensor:
    """Inverse frequencies of the rotary pairs: [kv_channels / 4], float32."""
    dim = config.kv_channels // 2
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def rotary_angles(config: ChatGLM2Config, position_ids: torch.Tensor, dtype: torch.dtype):
    """Cosine and sine of the rotary angles, computed in float32: at float16, positions above 2048 would collapse.

    Args:
        position_ids: [batch, tokens].

    Returns:
        cos, sin: [batch, tokens, 1, kv_channels / 4], of `dtype`.
    """
    if config.rope_ratio_scales_base:
        frequencies = rotary_frequencies(config, 10000 * config.rope_ratio)
    else:
        frequencies, position_ids = rotary_frequencies(config), position_ids.float() / config.rope_ratio
    angles = position_ids[:, :, None, None] * frequencies.to(position_ids.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, config: ChatGLM2Config) -> torch.Tensor:
    """Rotate the queries and keys of mixed [batch, tokens, size].

    Of each head the first half is rotated, neighbours paired; the second passes.
    """
    rotated = mixed.clone()
    if config.multi_query_attention:  # [all q heads | k groups | v groups]
        heads = config.num_attention_heads + config.num_groups
        old, new = (split_heads(x, config.kv_channels)[:, :, :heads] for x in (mixed, rotated))
    else:  # head by head [q | k | v]
        old, new = (x.unflatten(-1, (-1, 3, config.kv_channels))[:, :, :, :2] for x in (mixed, rotated))
        cos, sin = cos[:, :, None], sin[:, :, None]
    (even, odd), (new_even, new_odd) = (
        x[..., : config.kv_channels // 2].unflatten(-1, (-1, 2)).unbind(-1) for x in (old, new)
    )
    torch.sub(even * cos, odd * sin, out=new_even)
    torch.add(odd * cos, even * sin, out=new_odd)
    return rotated


class SelfAttention(nn.Module):
    is_causal = True

    def __init__(self, config: ChatGLM2Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_groups
        self.rotate = functools.partial(rotate, config=config)
        self.num_key_value_groups = self.num_heads // self.num_groups  # query heads a key/value head, for the registry
        size = self.num_heads * self.head_dim
        self.query_key_value = nn.Linear(
            config.hidden_size, size + 2 * self.num_groups * self.head_dim, bias=config.add_qkv_bias
        )
        self.dense = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, hidden_states, angles, mask, prefix=None, cache=None, wanted=None):
        mixed = rotary(self.query_key_value(hidden_states), *angles, self.rotate)
        if self.config.multi_query_attention:  # see rotate
            heads = split_heads(mixed, self.head_dim)
            q, k, v = heads.split([self.num_heads, self.num_groups, self.num_groups], dim=2)
        else:
            q, k, v = split_heads(mixed, 3 * self.head_dim).chunk(3, dim=-1)
        return self.dense(take(attend(self, q, k, v, mask, prefix, cache), wanted))


class MLP(TiledMLP):
    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def transform(self, hidden_states, in_checkpoint):
        hidden_states = self.dense_h_to_4h(hidden_states)
        if in_checkpoint:
            return self.dense_4h_to_h(swiglu(hidden_states))
        return through(swiglu, self.dense_4h_to_h, hidden_states)


class ChatGLM2Block(Block):
    def __init__(self, config: ChatGLM2Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, hidden_states, angles, mask, prefix=None, cache=None, wanted=None):
        attended = self.self_attention(self.input_layernorm(hidden_states), angles, mask, prefix, cache, wanted)
        hidden_states = take(hidden_states, wanted) + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), self.gradient_checkpointing)


class ChatGLM2PreTrainedModel(ChatGLMPreTrainedModel):
    mode = "glm2"
    config_class = ChatGLM2Config
    config: ChatGLM2Config
    _no_split_modules = ["ChatGLM2Block"]


class Embedding(nn.Module):
    """A level of its own in the official parameter names."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Encoder(nn.Module):
    """A level of its own in the official parameter names."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.layers = nn.ModuleList(ChatGLM2Block(config, i) for i in range(config.num_layers))
        self.final_layernorm = RMSNorm(config)


class ChatGLM2Model(ChatGLM2PreTrainedModel):
    """The transformer; it holds the output layer, as the official names have it, but does not apply it."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.output_layer = OutputLayer(config.hidden_size, config.padded_vocab_size, bias=False)
        if config.pre_seq_len is not None:
            kv_size = config.num_layers * config.kv_channels * config.num_groups * 2
            self.prefix_encoder = PrefixEncoder(config, kv_size, embedding_size=kv_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value):
        self.embedding.word_embeddings = value

    def forward(
        self,
        input_ids: torch.Tensor,  # [batch, tokens]
        attention_mask: torch.Tensor | None = None,  # [batch, cached + tokens], 1 real, 0 padding
        position_ids: torch.Tensor | None = None,  # [batch, tokens]
        cache: DynamicCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        segments: list[tuple[int, int]] | None = None,  # of the one row there is: tokens, and 0
        wanted: torch.Tensor | None = None,  # see take
    ) -> BaseModelOutputWithPast:
        cache, cached = self.prepare_cache(cache, use_cache)
        tokens = input_ids.shape[1]
        if segments is not None:
            position_ids = torch.cat([torch.arange(length, device=input_ids.device) for length, _ in segments])[None]
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(cached, cached + tokens, device=input_ids.device)[None]
            else:
                position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        prefix = self.prefixes(len(segments or input_ids))
        # more keys than queries: sdpa's own causal flag would align at the first key, and a mask must know of all keys
        if attention_mask is None and cached and (tokens > 1 or prefix is not None):
            attention_mask = input_ids.new_ones(len(input_ids), cached + tokens)

        hidden_states = self.embedding.word_embeddings(input_ids)
        if segments is not None:
            mask = [Segment(*segment) for segment in segments]
        elif cached and attention_mask is None:
            mask = None  # one new token sees all there is
        else:
            mask = visible_mask(tokens, attention_mask, self.config, hidden_states.dtype, prefix=prefix)
        angles = rotary_angles(self.config, position_ids, hidden_states.dtype)

        hidden_states, all_hidden_states = self.run_layers(
            self.encoder.layers, hidden_states, angles, mask, prefix, cache, output_hidden_states, wanted
        )
        return BaseModelOutputWithPast(
            last_hidden_state=self.encoder.final_layernorm(hidden_states),
            cache=cache,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
        )


class ChatGLM2ForConditionalGeneration(ChatMixin, ChatGLM2PreTrainedModel, GenerationMixin):
    """ChatGLM2-6B with loss, `generate`, `chat` and `stream_chat`."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.transformer.output_layer

    def set_output_embeddings(self, value):
        self.transformer.output_layer = value

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
        head = self.transformer.output_layer
        return causal_lm_output(self, outputs, head, labels, logits_to_keep, num_items_in_batch, answer_positions)

    def official_buffers(self) -> dict[str, torch.Tensor]:
        """Tensors that official files hold and this model computes: written on export for the official code."""
        return {"transformer.rotary_pos_emb.inv_freq": rotary_frequencies(self.config)}

    # The official chat.

    def chat(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        max_length: int = 8192,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
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
        past_key_values=None,
        max_length: int = 8192,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        logits_processor=None,
        return_past_key_values: bool = False,
        **kwargs,
    ):
        """As `chat`, but yields (answer so far, history) after each token.

        With `return_past_key_values` the key/value cache comes third; passed back as `past_key_values` with the
        next query, only what is new in the conversation is computed.
        """
        sampling = self.sampling(do_sample, top_p, temperature)
        for *answer, cache in self.stream_reply(
            tokenizer, query, history, max_length, logits_processor, cache=past_key_values, **sampling, **kwargs
        ):
            yield (*answer, cache) if return_past_key_values else tuple(answer)

    @staticmethod
    def process_response(response: str) -> str:
        """The official clean-up: strip, and the training date."""
        return response.strip().replace("[[训练时间]]", "2023年")
