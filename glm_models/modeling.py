"""What the networks of the three families share: P-Tuning prefix, blocks, forward passes, loss."""

import contextlib

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention import LayerInputs, PackedRow, Segment, as_segments, pack_row, why_one_by_one
from .ops import TiledMLP, offload_checkpoint_input, summed_cross_entropy
from .rotary import rotation_matrices

IGNORE_INDEX = -100  # label of a token that the loss ignores, as in torch and transformers


class PrefixEncoder(nn.Module):
    """P-Tuning v2: trained keys and values in front of those of the tokens, in every layer.

    With `prefix_projection`, embedding -> Linear -> Tanh -> Linear; without, only the embedding.
    """

    def __init__(self, config, kv_size: int, embedding_size: int):
        super().__init__()
        if config.prefix_projection:
            self.embedding = nn.Embedding(config.pre_seq_len, embedding_size)
            self.trans = nn.Sequential(
                nn.Linear(embedding_size, config.hidden_size), nn.Tanh(), nn.Linear(config.hidden_size, kv_size)
            )
        else:
            self.embedding = nn.Embedding(config.pre_seq_len, kv_size)
        self.dropout = nn.Dropout(config.prefix_dropout)
        for module in self.modules():
            module.in_prefix = True  # for _init_weights

    def forward(self, batch: int, layers: int, head_dim: int) -> torch.Tensor:
        """Keys and values of all layers: [layers, 2, batch, heads, pre_seq_len, head_dim]."""
        ids = torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)
        prefix = self.embedding(ids)  # [pre_seq_len, kv_size]
        if hasattr(self, "trans"):
            prefix = self.trans(prefix)
        prefix = prefix.view(len(ids), layers, 2, -1, head_dim).permute(1, 2, 3, 0, 4)
        return self.dropout(prefix[:, :, None].expand(-1, -1, batch, -1, -1, -1))  # each row has its own dropout


class Block(GradientCheckpointingLayer):
    """One layer of a network: forward(hidden_states, inputs) -> hidden_states."""

    offload_input = False  # see LanguageModelMixin.save_memory

    def get_attention(self) -> nn.Module:
        """The attention module: has num_heads and head_dim, and `dense` is the linear layer after attention."""
        raise NotImplementedError


class TransformerMixin:
    """Forward pass of a transformer without its output layer.

    The families give the blocks, the last norm, the rotary angles, and who sees whom at which position.
    """

    last_norm_in_hidden_states = False  # whether the last of the output's hidden_states is after the last norm
    noise_alpha = 0.0  # see add_embedding_noise

    @property
    def blocks(self) -> nn.ModuleList:
        raise NotImplementedError

    @property
    def last_norm(self) -> nn.Module:
        raise NotImplementedError

    def rotary_angles(self, position_ids: torch.Tensor) -> torch.Tensor:
        """The rotary angles of some positions, float32; their shape fits the family's pairs, see apply_rotary."""
        raise NotImplementedError

    def segment_positions(self, input_ids: torch.Tensor, segments: tuple[Segment, ...]) -> torch.Tensor:
        """Position ids of a row of samples end to end; each sample has those that it would have alone."""
        raise NotImplementedError

    def default_mask(self, input_ids: torch.Tensor, cached: int) -> torch.Tensor | None:
        """The attention mask [batch, cached + tokens] where none is given; None: every token is real."""
        return None

    def default_positions(self, input_ids: torch.Tensor, attention_mask, cached: int) -> torch.Tensor:
        """Position ids of a padded batch where none are given; `cached` tokens lie before input_ids."""
        raise NotImplementedError

    def visible_mask(self, input_ids: torch.Tensor, attention_mask, cached: int, prefix, dtype) -> torch.Tensor | None:
        """Which token sees which in a padded batch; see attention.visible_mask."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.Tensor,  # [batch, tokens]
        attention_mask: torch.Tensor | None = None,  # [batch, cached + tokens], 1 real, 0 padding
        position_ids: torch.Tensor | None = None,  # [batch, tokens], for ChatGLM-6B [batch, axes, tokens]
        cache: DynamicCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        segments: list[tuple[int, int]] | torch.Tensor | None = None,  # samples of the one row: tokens and context
        keep_positions: torch.Tensor | None = None,  # see select_tokens
    ) -> BaseModelOutputWithPast:
        cache, cached = self.prepare_cache(cache, use_cache)
        segments = as_segments(segments)
        hidden_states = self.get_input_embeddings()(input_ids)
        if self.training and self.noise_alpha:
            hidden_states = hidden_states + self.noise_like(hidden_states, attention_mask, segments)
        prefix = self.prefix_key_values(len(segments or input_ids))
        mask = packed = None
        if segments is not None:
            position_ids = self.segment_positions(input_ids, segments)
            packed = self.pack(segments, hidden_states)
        else:
            if attention_mask is None:
                attention_mask = self.default_mask(input_ids, cached)
            if position_ids is None:
                position_ids = self.default_positions(input_ids, attention_mask, cached)
            mask = self.visible_mask(input_ids, attention_mask, cached, prefix, hidden_states.dtype)
        rotation = rotation_matrices(self.rotary_angles(position_ids), hidden_states.dtype)
        # unbound at once: where each layer takes its part by index, its gradient is as large as that of all layers
        prefixes = prefix.unbind() if prefix is not None else None

        inputs = LayerInputs(rotation, mask, segments, packed, prefixes, cache, keep_positions)
        hidden_states, all_hidden_states = self.run_layers(hidden_states, inputs, output_hidden_states)
        normed = self.last_norm(hidden_states)
        last = normed if self.last_norm_in_hidden_states else hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=normed,
            cache=cache,
            hidden_states=(*all_hidden_states, last) if output_hidden_states else None,
        )

    def prepare_cache(self, cache: DynamicCache | None, use_cache: bool | None) -> tuple[DynamicCache | None, int]:
        """The key/value cache to use, and the number of tokens that are already in it."""
        use_cache = use_cache if use_cache is not None else self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache()
        return cache, cache.get_seq_length() if cache is not None else 0

    def noise_like(self, embedded: torch.Tensor, attention_mask, segments: tuple[Segment, ...] | None) -> torch.Tensor:
        """NEFTune's noise (arXiv:2310.05914): uniform in [-1, 1), times alpha / sqrt(tokens of the sample x hidden).

        The tokens of a sample are those of its segment; in a padded batch its real ones, and padding gets no noise.

        Args:
            embedded: [batch, tokens, hidden].
        """
        if segments is not None:
            lengths = torch.tensor([segment.tokens for segment in segments], device=embedded.device)
            lengths = lengths.repeat_interleave(lengths, output_size=embedded.shape[1])[None]  # [1, tokens]
        elif attention_mask is not None:
            real = attention_mask[:, -embedded.shape[1] :]
            lengths = torch.where(real > 0, real.sum(1, keepdim=True), torch.inf)  # [batch, tokens]
        else:
            lengths = torch.tensor([[embedded.shape[1]]], device=embedded.device)
        scale = self.noise_alpha / (lengths * embedded.shape[-1]).float().sqrt()
        return torch.empty_like(embedded).uniform_(-1, 1).mul_(scale[..., None])

    def prefix_key_values(self, batch: int) -> torch.Tensor | None:
        """The P-Tuning prefix of every layer: [layers, 2, batch, heads, pre_seq_len, head_dim], or None."""
        if self.config.pre_seq_len is None:
            return None
        return self.prefix_encoder(batch, self.config.num_layers, self.blocks[0].get_attention().head_dim)

    def pack(self, segments: tuple[Segment, ...], hidden_states: torch.Tensor) -> PackedRow | None:
        """A row of samples for one call of attention; None where each sample needs one."""
        if self.why_one_by_one(hidden_states.device, hidden_states.dtype) is not None:
            return None
        return pack_row(segments, self.config.pre_seq_len or 0, hidden_states.device)

    def why_one_by_one(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why each sample of a row needs a call of attention; None where one call takes all, see attention.py."""
        head_dim = self.blocks[0].get_attention().head_dim
        return why_one_by_one(self.config._attn_implementation, device, dtype, head_dim)

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        inputs: LayerInputs,
        output_hidden_states: bool = False,
        numbers: range | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """All blocks, one after the other.

        Args:
            numbers: of the blocks to run, in a stage of a pipeline; None for all.

        Returns:
            The last hidden states, [batch, tokens, hidden], or [1, kept, hidden] with inputs.keep_positions; and with
            output_hidden_states the input of every block, else an empty list.
        """
        all_hidden_states = []
        for i in range(len(self.blocks)) if numbers is None else numbers:
            layer = self.blocks[i]
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            offloads = layer.offload_input and layer.gradient_checkpointing and layer.training
            # no graph below the lowest layer that trains: a checkpoint would keep the layer's input all the same
            trains = inputs.prefix is not None or any(p.requires_grad for p in layer.parameters())
            needs_graph = trains or hidden_states.requires_grad
            with (
                torch.set_grad_enabled(needs_graph and torch.is_grad_enabled()),
                offload_checkpoint_input(hidden_states) if offloads else contextlib.nullcontext(),
            ):
                hidden_states = layer(hidden_states, inputs.for_layer(i, is_last=i == len(self.blocks) - 1))
        return hidden_states, all_hidden_states


class LanguageModelMixin:
    """A transformer with an output layer: logits and loss, and what training asks of the family."""

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
        segments: list[tuple[int, int]] | torch.Tensor | None = None,
        answer_positions: torch.Tensor | None = None,
        **_,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        Args:
            segments: the samples of a row that holds several: tokens and context of each, as pairs or [samples, 2].
            labels: [batch, tokens], aligned with input_ids (the shift is made here); IGNORE_INDEX: nothing to learn.
            logits_to_keep: number of last positions, or their indices; 0 for all.
            num_items_in_batch: divisor of the summed loss; None for the number of labels in this batch.
            answer_positions: see `answer_loss`.

        Returns:
            In training with labels, `logits` is None: only the answer's positions go through the output layer.
        """
        keep_positions = None if labels is None or answer_positions is None else answer_positions - 1
        outputs = self.transformer(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            use_cache,
            output_hidden_states=output_hidden_states,
            segments=segments,
            keep_positions=keep_positions,
        )
        head = self.get_output_embeddings()
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            loss = answer_loss(hidden_states, labels, head, num_items_in_batch, answer_positions)
        if labels is None or not (self.training or answer_positions is not None):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = head(hidden_states[:, keep])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states
        )

    def save_memory(self, tiled_mlp: bool = False, offload_inputs: bool = False) -> None:
        """Trade time for memory in training, for long rows.

        Args:
            tiled_mlp: the MLPs process a limited number of tokens at a time and are recomputed in the backward pass.
            offload_inputs: the input of each checkpointed layer is kept in main memory.
        """
        for module in self.modules():
            if isinstance(module, Block):
                module.offload_input = offload_inputs
            elif isinstance(module, TiledMLP):
                module.tiled = tiled_mlp

    def add_embedding_noise(self, alpha: float) -> None:
        """Add noise to the embeddings in training; see TransformerMixin.noise_like.

        Args:
            alpha: its strength; 0 for none.
        """
        self.transformer.noise_alpha = alpha

    @staticmethod
    def has_weight_decay(name: str) -> bool:
        """Whether the optimizer applies weight decay to the parameter of this name: not to biases and norms."""
        return not (name.endswith("bias") or "layernorm" in name)

    @classmethod
    def worst_case_batch(cls, config, rows: int, max_len: int, max_src_len: int) -> dict:
        """Arguments of forward for the training batch that needs the most memory.

        Every token except the first is a label: the shorter the prompts, the more of the last block is kept.

        Args:
            rows: samples of the batch; all stand in one row.
            max_len: tokens of each sample.
            max_src_len: maximum tokens of a prompt.

        Returns:
            input_ids and labels [1, rows * max_len], segments, answer_positions [labels], num_items_in_batch.
        """
        ids, context = cls.worst_case_sample(config, max_len, max_src_len)
        labels = [IGNORE_INDEX, *ids[1:]] * rows
        return {
            "input_ids": torch.tensor([ids * rows]),
            "labels": torch.tensor([labels]),
            "segments": [(len(ids), context)] * rows,
            "answer_positions": torch.tensor([i for i, label in enumerate(labels) if label != IGNORE_INDEX]),
            "num_items_in_batch": 1.0,
        }

    @classmethod
    def worst_case_sample(cls, config, max_len: int, max_src_len: int) -> tuple[list[int], int]:
        """The ids of one sample for `worst_case_batch`, and how many of them are context (see Segment)."""
        return [1] * max_len, 0


def select_tokens(x: torch.Tensor, keep_positions: torch.Tensor | None) -> torch.Tensor:
    """Some tokens of x [batch, tokens, size], by their index in the flattened batch: [1, kept, size]; None for all.

    After attention, the last block needs only the tokens that predict a token of an answer.
    """
    return x if keep_positions is None else x.flatten(0, 1).index_select(0, keep_positions)[None]


def answer_loss(hidden_states, labels, head, num_items=None, answer_positions=None) -> torch.Tensor:
    """Cross entropy of the labelled positions, in float32.

    Args:
        hidden_states: [batch, tokens, hidden]; with answer_positions [1, labels, hidden], of the tokens before them.
        labels: [batch, tokens].
        num_items: the divisor; None for the number of labels.
        answer_positions: [labels], their index in the flattened labels; None: searched here, which waits for the GPU.
    """
    if answer_positions is None:
        labelled = labels != IGNORE_INDEX
        labelled[:, 0] = False  # no token before it could predict it
        answer_positions = labelled.flatten().nonzero()[:, 0]
        hidden_states = select_tokens(hidden_states, answer_positions - 1)
    total = summed_cross_entropy(head, hidden_states[0], labels.flatten().index_select(0, answer_positions))
    return total / (num_items if num_items is not None else max(1, len(answer_positions)))
