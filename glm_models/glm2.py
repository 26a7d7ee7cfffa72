"""ChatGLM2-6B: RMSNorm, grouped key/value heads, rotary on half of each head. ChatGLM3-6B is the same network."""

import functools
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from transformers import GenerationMixin

from .attention import LayerInputs, attention_forward, split_heads, token_places, visible_mask
from .chat import ChatMixin
from .checkpoint import CheckpointError
from .config import ChatGLMConfigBase
from .families import FAMILIES
from .histories import check_pairs
from .modeling import Block, LanguageModelMixin, PrefixEncoder, TransformerMixin, select_tokens
from .ops import OutputLayer, TiledMLP, linear_of_recomputed, rms_norm, swiglu
from .pretrained import ChatGLMPreTrainedModel
from .rotary import apply_rotary, glm2_angles, glm2_frequencies, glm2_pairs
from .tokenization import NO_IDS, ChatGLMTokenizerBase, Prompt


class ChatGLM2Config(ChatGLMConfigBase):
    """config.json of ChatGLM2-6B; the defaults are the official values."""

    model_type = "chatglm"
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "head_dim": "kv_channels",
        "max_position_embeddings": "seq_length",
    }
    title: ClassVar[str] = FAMILIES["glm2"].title

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

    # rope_ratio has two official meanings. In ChatGLM2-6B-32K it divides the positions (linear interpolation).
    rope_ratio_scales_base: ClassVar[bool] = False

    # The network below computes only these; a config with another value is refused.
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
                f"num_attention_heads {self.num_attention_heads} is not a multiple of multi_query_group_num "
                f"{self.num_groups}"
            )
        if self.kv_channels % 4:  # half of each head is rotated, in pairs
            raise CheckpointError(f"kv_channels {self.kv_channels} is not a multiple of 4")

    @property
    def num_groups(self) -> int:
        """Key/value heads."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads


class ChatGLM2Tokenizer(ChatGLMTokenizerBase):
    """tokenizer.model; the special tokens have the ids after its pieces, in the order of `special_tokens`."""

    mode = "glm2"
    vocab_files_names = {"vocab_file": FAMILIES["glm2"].vocabulary}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    special_tokens = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")

    def __init__(self, vocab_file, **kwargs):
        # Always the official values: older versions of transformers saved others in tokenizer_config.json.
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
        begins = {self.get_command("<bos>"), self.get_command("sop")}  # no code reads it
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
        """The ids with which every prompt begins."""
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    @property
    def special_texts(self) -> list[str]:
        # `sop` and `eop` are also words
        return sorted({*super().special_texts, *(token for token in self.special_tokens if token[0] in "[<")})

    def _encode_each(self, queries, histories, max_src_len=None, threads=1) -> list[Prompt]:
        first = self._template(None)
        templates = [self._template(history) if history else first for history in histories]
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
        # not as in transformers, which recognises `</s>` and `<unk>` in any text: here text stays text
        return self._tokenize(text)

    def _tokenize(self, text: str) -> list[str]:
        return self.sp_model.EncodeAsPieces(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_command(token) if token in self.special_tokens else super()._convert_token_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        if index < self.sp_model.GetPieceSize():
            return self.sp_model.IdToPiece(index)
        # ids after the special tokens are unused rows of the padded embedding
        return self.special_tokens[index - self.sp_model.GetPieceSize()] if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text without control tokens and this family's special tokens."""
        return super().convert_tokens_to_string([t for t in tokens if t not in self._silent_tokens])

    @property
    def _silent_tokens(self) -> set[str]:
        return {"<unk>", "<s>", "</s>", "", *self.special_tokens}

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        ids = self.get_prefix_tokens() + list(token_ids_0)
        return ids if token_ids_1 is None else ids + list(token_ids_1) + [self.get_command("<eos>")]

    def _pad(self, encoded_inputs, *args, **kwargs):
        """Adds position ids; the first token that is not padding has position 0."""
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
        self.pairs = functools.partial(glm2_pairs, config=config)
        self.num_key_value_groups = (
            self.num_heads // self.num_groups
        )  # query heads per key/value head, for the registry
        size = self.num_heads * self.head_dim
        self.query_key_value = nn.Linear(
            config.hidden_size, size + 2 * self.num_groups * self.head_dim, bias=config.add_qkv_bias
        )
        self.dense = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        mixed = apply_rotary(self.query_key_value(hidden_states), inputs.rotation, self.pairs)
        if self.config.multi_query_attention:  # see glm2_pairs
            heads = split_heads(mixed, self.head_dim)
            q, k, v = heads.split([self.num_heads, self.num_groups, self.num_groups], dim=2)
        else:
            q, k, v = split_heads(mixed, 3 * self.head_dim).chunk(3, dim=-1)
        return self.dense(select_tokens(attention_forward(self, q, k, v, inputs), inputs.keep_positions))


class MLP(TiledMLP):
    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def transform(self, hidden_states, in_checkpoint):
        hidden_states = self.dense_h_to_4h(hidden_states)
        if in_checkpoint:
            return self.dense_4h_to_h(swiglu(hidden_states))
        return linear_of_recomputed(swiglu, self.dense_4h_to_h, hidden_states)


class ChatGLM2Block(Block):
    def __init__(self, config: ChatGLM2Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def get_attention(self):
        return self.self_attention

    def forward(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        attended = self.self_attention(self.input_layernorm(hidden_states), inputs)
        hidden_states = select_tokens(hidden_states, inputs.keep_positions) + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), self.gradient_checkpointing)


class ChatGLM2PreTrainedModel(ChatGLMPreTrainedModel):
    mode = "glm2"
    config_class = ChatGLM2Config
    config: ChatGLM2Config
    _no_split_modules = ["ChatGLM2Block"]


class Embedding(nn.Module):
    """A module only because the official parameter names have this level."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Encoder(nn.Module):
    """A module only because the official parameter names have this level."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.layers = nn.ModuleList(ChatGLM2Block(config, i) for i in range(config.num_layers))
        self.final_layernorm = RMSNorm(config)


class ChatGLM2Model(TransformerMixin, ChatGLM2PreTrainedModel):
    """The transformer. It holds the output layer, because of the official parameter names, but does not apply it."""

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

    @property
    def blocks(self):
        return self.encoder.layers

    @property
    def last_norm(self):
        return self.encoder.final_layernorm

    def rotary_angles(self, position_ids):
        return glm2_angles(self.config, position_ids)

    def segment_positions(self, input_ids, segments):
        return token_places(segments, input_ids.device)[1][None]

    def default_positions(self, input_ids, attention_mask, cached):
        tokens = input_ids.shape[1]
        if attention_mask is None:
            return torch.arange(cached, cached + tokens, device=input_ids.device)[None]
        return (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]

    def visible_mask(self, input_ids, attention_mask, cached, prefix, dtype):
        tokens = input_ids.shape[1]
        if attention_mask is None and cached:
            if tokens == 1 and prefix is None:
                return None  # one new token sees all tokens
            # more keys than queries: the causal flag of sdpa would align them at the first key
            attention_mask = input_ids.new_ones(len(input_ids), cached + tokens)
        return visible_mask(tokens, attention_mask, self.config, dtype, prefix=prefix)


class ChatGLM2ForConditionalGeneration(ChatMixin, LanguageModelMixin, ChatGLM2PreTrainedModel, GenerationMixin):
    """ChatGLM2-6B with loss, `generate`, `chat` and `stream_chat`."""

    chat_defaults: ClassVar[dict] = {"max_length": 8192, "top_p": 0.8, "temperature": 0.8}

    def __init__(self, config: ChatGLM2Config):
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.transformer.output_layer

    def set_output_embeddings(self, value):
        self.transformer.output_layer = value

    def official_buffers(self) -> dict[str, torch.Tensor]:
        """Tensors that this model computes and official files contain: exported for the official code."""
        return {"transformer.rotary_pos_emb.inv_freq": glm2_frequencies(self.config)}

    @staticmethod
    def process_response(response: str) -> str:
        """The official clean-up: white space at both ends, and the training date."""
        return response.strip().replace("[[训练时间]]", "2023年")
