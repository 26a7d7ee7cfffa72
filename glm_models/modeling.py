"""What the three networks share: loading rules, initialisation, attention, masks, the P-Tuning prefix, the loss."""

import contextlib
import math
import os
import re

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .checkpoint import CheckpointError, read_json, shown, weight_layout
from .families import check_family
from .ops import TiledMLP, input_in_main_memory, summed_cross_entropy

IGNORE_INDEX = -100  # the label of a token that the loss leaves out, as in torch and transformers


class PrefixEncoder(nn.Module):
    """P-Tuning v2: trained keys and values that stand before those of the tokens, in every layer.

    With `prefix_projection`, embedding -> Linear -> Tanh -> Linear; without, the embedding alone.
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
        return self.dropout(prefix[:, :, None].expand(-1, -1, batch, -1, -1, -1))  # dropout differs from row to row


class Block(GradientCheckpointingLayer):
    """One layer of a network."""

    offload_input = False  # see save_memory


class ChatGLMPreTrainedModel(PreTrainedModel):
    """Loading, initialisation and what transformers wants to know about a ChatGLM."""

    mode: str  # the key in MODE
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True  # of the rows of samples that training has; not of padded batches
    _supports_attention_backend = True
    # computed here, never read: some official files hold them, some do not
    _keys_to_ignore_on_load_unexpected = [r"\.inv_freq$"]
    # see check_prefix
    _keys_to_ignore_on_load_missing = [r"prefix_encoder\."]

    def __init__(self, config, *args, **kwargs):
        if config.quantization_bit:
            raise CheckpointError(
                f"the checkpoint holds weights quantised to {config.quantization_bit} bits; "
                "use the unquantised one (quantization_bit 0)"
            )
        super().__init__(config, *args, **kwargs)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """As in transformers, but without its warning: peft asks by this old name."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, new_prefix: bool = False, **kwargs):
        """As in transformers, but any weight that is missing, left over or of another shape is an error.

        Args:
            config: None for the folder's own; then kwargs may hold keys of it to set differently.
            new_prefix: see check_prefix.

        Raises:
            CheckpointError: the folder is missing, of another family, incomplete, or its shapes do not fit its config.
        """
        folder = str(pretrained_model_name_or_path)
        check_family(folder, cls.mode, need=("config",))
        if config is None:
            changes = {key: kwargs.pop(key) for key in cls.config_class.own_keys() if key in kwargs}
            config = cls.config_class.from_pretrained(folder, **changes)
        cls.check_weights(folder, config, new_prefix)  # broken files and indices end here too
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            folder,
            *args,
            **kwargs,
            config=config,
            generation_config=read_generation_config(folder, config),
            use_safetensors=None,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with all else
        )
        misshapen = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
        cls.check_fit(folder, info["missing_keys"], info["unexpected_keys"], misshapen)
        return (model, info) if wants_info else model

    @classmethod
    def check_weights(cls, folder: str, config, new_prefix: bool = False) -> None:
        """Make sure that a folder's weights are those of a config, before any memory is taken for them.

        Args:
            new_prefix: see check_prefix.

        Raises:
            CheckpointError: they are not, or a file is missing or broken.
        """
        found = {name: shape for names in weight_layout(folder).values() for name, (_, shape) in names.items()}
        check_prefix(folder, config, found, new_prefix)
        with torch.device("meta"), init.no_init_weights():
            model = cls(config)
        wanted = {name: weight.shape for name, weight in model.named_parameters(remove_duplicate=False)}
        missing = wanted.keys() - found.keys()
        for pair in model.all_tied_weights_keys.items():
            if not missing.issuperset(pair):
                missing -= {*pair}
        unknown = [name for name in found if name not in wanted and not cls.is_computed(name)]
        cls.check_fit(folder, missing, unknown, [name for name in wanted.keys() & found if wanted[name] != found[name]])

    @classmethod
    def is_computed(cls, name: str) -> bool:
        """Whether a weight of a file is not read, because it is computed here."""
        return any(re.search(pattern, name) for pattern in cls._keys_to_ignore_on_load_unexpected)

    @staticmethod
    def check_fit(folder: str, missing, unknown, misshapen) -> None:
        """Make sure that the weights of a folder are those of the model, by the names of those that are not.

        Raises:
            CheckpointError: they are not; it tells of all three kinds.
        """
        # check_prefix has seen to it that a prefix is missing only where a new one is to be trained
        missing = [name for name in missing if "prefix_encoder." not in name]
        kinds = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
        wrong = [f"{len(names)} {kind} (first: {min(names)})" for kind, names in kinds.items() if names]
        if wrong:
            raise CheckpointError(f"the weights in {folder} do not fit its config.json: {', '.join(wrong)}")

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for attend's call of the registry in the source of each family's module only

    @torch.no_grad()
    def _init_weights(self, module):
        """Every weight that a checkpoint lacks gets a value: prefix encoders, or all of a model made from a config."""
        std = self.config.initializer_range
        if hasattr(module, "in_prefix"):
            # torch's own, as the official models have it: a prefix of 0.02 would hardly move, so deep is it multiplied
            if isinstance(module, nn.Linear):
                init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                init.normal_(module.weight)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif hasattr(module, "weight") and not list(module.children()):  # the norms
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)

    def prepare_cache(self, cache: DynamicCache | None, use_cache: bool | None) -> tuple[DynamicCache | None, int]:
        """The key/value cache to use, and how many tokens it holds already."""
        use_cache = use_cache if use_cache is not None else self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache()
        return cache, cache.get_seq_length() if cache is not None else 0

    def save_memory(self, tiled_mlp: bool = False, offload_inputs: bool = False) -> None:
        """Trade time for memory in training, for long rows.

        Args:
            tiled_mlp: the MLPs take some tokens at a time and are computed again in the backward pass.
            offload_inputs: what gradient checkpointing keeps, one hidden state a layer, waits in main memory.
        """
        for module in self.modules():
            if isinstance(module, Block):
                module.offload_input = offload_inputs
            elif isinstance(module, TiledMLP):
                module.tiled = tiled_mlp

    def run_layers(self, layers, hidden_states, angles, mask, prefix, cache, output_hidden_states, wanted=None):
        """All blocks, one after the other.

        Args:
            wanted: see `take`; the last block computes no more than that, once attention has seen all tokens.

        Returns:
            The last hidden states [batch, tokens, hidden], or [1, wanted, hidden]; and the input of every block if
            output_hidden_states, else nothing. (So with `wanted` the last is shorter than those.)
        """
        all_hidden_states = []
        for i, layer in enumerate(layers):
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            offloads = layer.offload_input and layer.gradient_checkpointing and self.training
            # below the lowest layer that trains there is no graph: a checkpoint would keep its input nevertheless
            trains = prefix is not None or any(p.requires_grad for p in layer.parameters())
            learns = trains or hidden_states.requires_grad
            with (
                torch.set_grad_enabled(learns and torch.is_grad_enabled()),
                input_in_main_memory(hidden_states) if offloads else contextlib.nullcontext(),
            ):
                layer_prefix = prefix[i] if prefix is not None else None
                positions = wanted if i == len(layers) - 1 else None
                hidden_states = layer(hidden_states, angles, mask, layer_prefix, cache, positions)
        return hidden_states, all_hidden_states

    def prefixes(self, batch: int) -> torch.Tensor | None:
        """The P-Tuning prefix of every layer: [layers, 2, batch, heads, pre_seq_len, head_dim], or None."""
        if self.config.pre_seq_len is None:
            return None
        head_dim = getattr(self.config, "kv_channels", self.config.hidden_size // self.config.num_attention_heads)
        return self.prefix_encoder(batch, self.config.num_layers, head_dim)


PREFIX = "prefix_encoder."  # in the names of a prefix's weights
PROJECTED = 5  # so many there are with prefix_projection: an embedding, and weights and biases of two layers


def check_prefix(folder: str, config, shapes: dict[str, torch.Size], new_prefix: bool = False) -> None:
    """Make sure that a folder's weights hold the P-Tuning prefix that a config asks for.

    Args:
        shapes: of the folder's weights.
        new_prefix: one is to be trained. It may be missing then, and also where the folder's config.json names none.

    Raises:
        CheckpointError: the prefix is missing, it is of another length or kind, or there is nothing but a prefix.
    """
    prefix = {name.split(PREFIX)[1]: shape for name, shape in shapes.items() if PREFIX in name}
    length = prefix["embedding.weight"][0] if prefix.get("embedding.weight") else None
    projection = any(name.startswith("trans.") for name in prefix)
    if prefix and all(PREFIX in name or name.endswith("inv_freq") for name in shapes):
        base = read_json(os.path.join(folder, "config.json")).get("_name_or_path")
        raise CheckpointError(
            f"{folder} holds a P-Tuning prefix alone (length {length}), as the official script saves it, and not the "
            f"model that it was trained on ({shown(base)}). Such folders are not read yet: put these weights and the "
            "model's into one model.safetensors beside the model's other files, and pre_seq_len "
            f"{length}, prefix_projection {str(projection).lower()} into its config.json"
        )
    if config.pre_seq_len is None:  # a prefix that nobody asks for is found by check_fit
        return
    asked = f"pre_seq_len {config.pre_seq_len}, prefix_projection {str(config.prefix_projection).lower()}"
    if not prefix:
        if not new_prefix and has_lost_prefix(folder):
            raise CheckpointError(
                f"{folder}: config.json asks for a P-Tuning prefix ({asked}), but there is none among the weights; "
                "set pre_seq_len to null. Only --train_type ptuning makes a new one"
            )
    elif length != config.pre_seq_len or projection != config.prefix_projection:
        raise CheckpointError(
            f"the prefix in {folder} (transformer.{PREFIX}embedding) has pre_seq_len {length}, prefix_projection "
            f"{str(projection).lower()}, but asked for are {asked}; a trained prefix keeps its length and kind"
        )
    elif len(prefix) != (PROJECTED if projection else 1):
        raise CheckpointError(f"{folder}: weights of the P-Tuning prefix are missing; there are {', '.join(prefix)}")


def has_lost_prefix(folder: str) -> bool:
    """Whether a folder's config.json names a prefix that is not among its weights."""
    names = (name for names in weight_layout(folder).values() for name in names)
    asked = read_json(os.path.join(folder, "config.json")).get("pre_seq_len") is not None
    return asked and not any(PREFIX in name for name in names)


def read_generation_config(folder: str, config) -> GenerationConfig:
    """The ids of special tokens in generation_config.json, or else in the config.

    All other keys would change greedy answers, load code or other models: what is generated is for flags to say.

    Raises:
        CheckpointError: the file is broken, or an id is none.
    """
    path = os.path.join(folder, "generation_config.json")
    content = read_json(path) if os.path.lexists(path) else {}
    ids = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids[key] = content.get(key, getattr(config, key))
        numbers = ids[key] if isinstance(ids[key], list) and key == "eos_token_id" else [ids[key]]
        if ids[key] is not None and not (numbers and all(type(n) is int and 0 <= n < 10**8 for n in numbers)):
            raise CheckpointError(f"{path}: {key} must be the id of a token, not {shown(ids[key])}")
    return GenerationConfig(**ids)


def take(x: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    """Some tokens of x [batch, tokens, size], by their places in the flattened batch: [1, wanted, size]; None for all.

    In the last block, once attention is through, nobody asks for tokens but those that predict one of an answer.
    """
    return x if wanted is None else x.flatten(0, 1).index_select(0, wanted)[None]


def causal_lm_output(
    model, outputs, head, labels, logits_to_keep, num_items_in_batch, answer_positions
) -> CausalLMOutputWithPast:
    """Logits, and the loss where there are labels.

    Args:
        outputs: of the transformer; of the tokens before `answer_positions` alone where these are given.
        head: the output layer.
        labels: [batch, tokens], IGNORE_INDEX where there is nothing to learn; shifted here, so labels align with ids.
        logits_to_keep: the last so many positions, or their indices; 0 for all.
        num_items_in_batch: what the summed loss is divided by; None for this batch's own number of labels.
        answer_positions: see `answer_loss`.

    Returns:
        In training with labels, `logits` is None: only the answer's positions ever see the output layer.
    """
    hidden_states = outputs.last_hidden_state
    loss = logits = None
    if labels is not None:
        loss = answer_loss(hidden_states, labels, head, num_items_in_batch, answer_positions)
    if labels is None or not (model.training or answer_positions is not None):
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = head(hidden_states[:, keep])
    return CausalLMOutputWithPast(loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states)


def answer_loss(hidden_states, labels, head, num_items=None, answer_positions=None) -> torch.Tensor:
    """Cross entropy of the labelled positions, in float32.

    Args:
        hidden_states: [batch, tokens, hidden]; [1, answer tokens, hidden] of the tokens before them with
            answer_positions.
        labels: [batch, tokens].
        num_items: the divisor; None for the number of labels here.
        answer_positions: [answer tokens], where in the flattened labels they are; searched if None, for which a GPU
            must be waited for.
    """
    if answer_positions is None:
        labelled = labels != IGNORE_INDEX
        labelled[:, 0] = False  # nothing comes before it that could predict it
        answer_positions = labelled.flatten().nonzero()[:, 0]
        hidden_states = take(hidden_states, answer_positions - 1)
    total = summed_cross_entropy(head, hidden_states[0], labels.flatten().index_select(0, answer_positions))
    return total / (num_items if num_items is not None else max(1, len(answer_positions)))
