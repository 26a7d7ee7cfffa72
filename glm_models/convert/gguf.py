"""Write a ChatGLM2 or ChatGLM3, or a LoRA adapter of one, as a GGUF file for llama.cpp and what is built on it.

    python -m glm_models.convert.gguf --mode glm3 --model_path output-glm3/epoch-2-step-750-merged --output_dir my-gguf

Vocabulary, stop tokens and chat template are in the file. Names of keys and tensors are those of the package gguf:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import argparse

from glm_models import MODE
from glm_models.families import WHAT_SERVES_GLM, is_native
from tuning import exits
from tuning.arguments.models import Model
from tuning.arguments.parser import NewPath, Parser, answer_early

TYPES = ("float32", "float16", "bfloat16")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises UserError: see Parser.parse_args."""
    return make_parser().parse_args(argv)


def make_parser() -> Parser:
    parser = Parser(__doc__, contradictions)
    group = parser.group("models")
    group.add_argument("--mode", choices=MODE, required=True, help="model family: ChatGLM2-6B or ChatGLM3-6B")
    group.add_argument(
        "--model_path", type=Model(), required=True,
        help="an official model, as folder or name on a hub; a result; what glm_models.convert wrote; an adapter",
    )  # fmt: skip
    group.add_argument("--output_dir", type=NewPath(), required=True, help="folder to write; must be empty or new")
    group.add_argument(
        "--ori_model_dir", type=Model(), default_text="what the folder names",
        help="of an adapter: its base; of a GlmForCausalLM: the official folder with config and vocabulary",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=TYPES, default_text="that of the folder", help="type of the matrices in the file"
    )
    return parser


def contradictions(args: argparse.Namespace) -> list[str]:
    if args.mode == "glm":
        return [f"--mode glm: llama.cpp has no class for ChatGLM-6B; {WHAT_SERVES_GLM}"]
    return []


if __name__ == "__main__":
    exits.start_script()
    answer_early(parse_args)

import importlib
import os
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from glm_models.checkpoint import CheckpointError, FolderWeights, printable, weight_layout, weight_shapes
from glm_models.convert.adapter import Update, check_fit, is_native_adapter, official_update
from glm_models.convert.model import (
    Official,
    base_files,
    float_dtype,
    has_config,
    official_files,
    open_native,
    read_config,
    refuse_prefix,
)
from glm_models.convert.names import FUSED
from glm_models.convert.template import TEMPLATES
from glm_models.convert.tokenizer import USER_DEFINED, check_names, native_token, read_vocabulary
from glm_models.convert.weights import is_computed
from glm_models.messages import short_repr
from glm_models.streamed import as_bytes, return_freed_memory, skeleton
from tuning.errors import UserError
from tuning.exits import exit_on_user_errors
from tuning.folders import check_new_folder, check_space, claimed_folder
from tuning.hub import WEIGHTS, find_models
from tuning.lora.adapter import CONFIG, check_base, find_base, read_adapter, trained_bits
from utils import silence_libraries

ARCHITECTURE = "chatglm"
PACKAGE = "gguf==0.19.0"
NORMAL, CONTROL, UNUSED = 1, 3, 5  # types of tokens, which are those of SentencePiece's pieces
MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"


class Vocabulary(NamedTuple):
    """The tokens of a GGUF file in the order of their ids; one for each row of the embedding."""

    tokens: list[str]
    scores: list[float]
    types: list[int]


class Tensor(NamedTuple):
    """A tensor to write; `read` gives its values, so that one at a time is in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def gguf_package():
    """The module gguf. Raises UserError: it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UserError(f"the package gguf is not installed: pip install {PACKAGE}") from None


# Vocabulary and chat template


def make_vocabulary(tokenizer, rows: int) -> Vocabulary:
    """The tokens of a family's tokenizer for llama.cpp, which merges as SentencePiece does, by the scores of pieces.

    Prints a warning for pieces that llama.cpp cannot keep whole.

    Args:
        rows: of the embedding.

    Raises:
        CheckpointError: see read_vocabulary.
    """
    pieces = read_vocabulary(tokenizer.vocab_file).pieces
    check_names(tokenizer)
    # A user-defined token of llama.cpp would get a space before the text after it. As a normal one, a single character
    # stays what it is, since no longer piece has it.
    if own := [piece.piece for piece in pieces if piece.type == USER_DEFINED and len(piece.piece) > 1]:
        print(
            f"warning: SentencePiece keeps {len(own)} pieces whole, {short_repr(own[0])} for one, which llama.cpp may "
            "cut: texts with them can get other ids there"
        )
    tokens = [piece.piece for piece in pieces]
    scores = [piece.score for piece in pieces]
    types = [NORMAL if piece.type == USER_DEFINED else piece.type for piece in pieces]
    special = [native_token(token) for token in tokenizer.special_tokens]
    padding = [f"[PAD{i}]" for i in range(len(tokens) + len(special), rows)]
    types += [CONTROL] * len(special) + [UNUSED] * len(padding)
    scores += [0.0] * (rows - len(scores))
    return Vocabulary(tokens + special + padding, scores, types)


def chat_template(mode: str) -> str:
    """The chat template, without the words by which llama.cpp would take it for one of its own.

    Programs that do not run templates look for such words, and would write the prompts of ChatGLM4 or Falcon3 without
    a message; so they say that they do not know the template.
    """
    begin = "[gMASK]<sop>"
    template = TEMPLATES[mode].replace(begin, "{{- '[gMASK]' }}\n{{- '<sop>' }}")
    return re.sub(r"'<\|(\w+)\|>", r"'<|' + '\1|>", template)


# What is written


def add_model_fields(writer, official: Official, dtype: torch.dtype, title: str) -> None:
    """Add the keys that describe a network and its vocabulary."""
    config, gguf = official.config, gguf_package()
    writer.add_type("model")
    writer.add_name(title)
    kinds = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    writer.add_context_length(config.seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_groups)
    writer.add_layer_norm_rms_eps(config.layernorm_epsilon)
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_rope_dimension_count(config.kv_channels // 2)
    scales_base = config.rope_ratio_scales_base
    writer.add_rope_freq_base(10000.0 * config.rope_ratio if scales_base else 10000.0)
    if not scales_base and config.rope_ratio != 1:  # ChatGLM2-6B-32k: positions are divided
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(config.rope_ratio))

    vocabulary = make_vocabulary(official.tokenizer, config.padded_vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)  # the template has [gMASK] and <sop>
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    end, *roles = official.tokenizer.stop_token_ids
    writer.add_eos_token_id(end)
    for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), roles, strict=False):
        add(token)  # <|user|> and <|observation|> end an answer of ChatGLM3
    writer.add_chat_template(chat_template(official.mode))


def tensor_names(names: Iterable[str], layers: int) -> dict[str, str]:
    """The name in a GGUF file of each official name.

    Raises:
        CheckpointError: llama.cpp has no place for one.
    """
    gguf, found = gguf_package(), {}
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.CHATGLM, layers)
    for name in names:
        found[name] = known.get_name(name.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))
        if found[name] is None:
            raise CheckpointError(f"{name} has no place in llama.cpp's {ARCHITECTURE}")
    return found


def model_tensors(official: Official, weights, layout: dict, dtype: torch.dtype) -> list[Tensor]:
    """The tensors of a model.

    Args:
        weights: by official name.
        layout: file -> name -> (type, shape), see weight_layout.
        dtype: of matrices; norms and biases are float32, as llama.cpp wants them.
    """
    heads = official.heads
    shapes = {name: shape for names in layout.values() for name, (_, shape) in names.items() if not is_computed(name)}

    def reader(name: str, kind: torch.dtype) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            weight = weights[name]
            if FUSED in name and heads.interleaved:
                weight = torch.cat(heads.split(weight))
            made = weight.to(kind)
            if not made.isfinite().all() and weight.isfinite().all():
                raise CheckpointError(f"{name} has values that {kind} does not have; use --dtype bfloat16")
            return made

        return read

    kinds = {name: dtype if len(shape) == 2 else torch.float32 for name, shape in shapes.items()}
    return [
        Tensor(there, tuple(shapes[name]), kinds[name], reader(name, kinds[name]))
        for name, there in tensor_names(shapes, official.config.num_layers).items()
    ]


def adapter_tensors(official: Official, update: Update) -> list[Tensor]:
    """The tensors of a LoRA adapter, in float32."""
    heads, found = official.heads, []
    for name, there in tensor_names(update.pairs, official.config.num_layers).items():
        a, b = update.pairs[name]
        if FUSED in name and heads.interleaved:
            b = torch.cat(heads.split(b))
        found += [
            Tensor(f"{there}.lora_{part}", tuple(tensor.shape), torch.float32, tensor.float)
            for part, tensor in (("a", a), ("b", b))
        ]
    return found


def write_gguf(path: str, tensors: list[Tensor], add_fields: Callable) -> None:
    """Write a GGUF file, with one tensor in memory at a time, and read it again.

    Args:
        add_fields: called with the writer, adds the keys.

    Raises:
        CheckpointError: what was read is not what was written.
    """
    gguf = gguf_package()
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    add_fields(writer)
    for name, shape, dtype, _ in tensors:
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, gguf.GGMLQuantizationType[kinds[dtype]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(as_bytes(tensor.read()).numpy())
    writer.close()

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, shape, dtype, read in tensors:
        there = found.pop(name, None)
        same = there is not None and there.tensor_type.name == kinds[dtype] and there.shape.tolist() == [*shape][::-1]
        if not same or not np.array_equal(there.data.reshape(-1).view(np.uint8), as_bytes(read()).numpy()):
            raise CheckpointError(f"{name} is not in {path} as it was written; the disk or the memory is at fault")
    if found:
        raise CheckpointError(f"{path} has tensors that were not written: {', '.join(found)}")


# The two kinds of folders


def write_model(args) -> str:
    """Write a whole model. Returns what was written."""
    if is_native(read_config(args.model_path)):
        official = official_files(args.mode, args.model_path, args.ori_model_dir)
        weights = open_native(args.model_path, official)
        layout = weights.layout
    else:
        if args.ori_model_dir:
            raise UserError("--ori_model_dir does nothing for an official folder, which has all files")
        official = Official.read(args.mode, args.model_path)
        refuse_prefix(official, "llama.cpp")
        skeleton(args.mode, args.model_path)
        weights, layout = FolderWeights(args.model_path), weight_layout(args.model_path)
    config = official.config
    if config.num_attention_heads * config.kv_channels != config.hidden_size:
        raise CheckpointError(f"llama.cpp has no {ARCHITECTURE} whose heads are not as wide as hidden_size together")
    dtype = getattr(torch, args.dtype) if args.dtype else float_dtype(args.model_path)
    tensors = model_tensors(official, weights, layout, dtype)
    check_space(args.output_dir, sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in tensors), "the GGUF file")
    title = os.path.basename(os.path.abspath(args.model_path))
    with claimed_folder(args.output_dir) as partial:
        write_gguf(
            os.path.join(partial, MODEL_FILE), tensors, lambda writer: add_model_fields(writer, official, dtype, title)
        )
    print(f"verified: the {len(tensors)} tensors in {MODEL_FILE} are the weights of {printable(args.model_path)}")
    return f"{MODEL_FILE} in {str(dtype).removeprefix('torch.')}, with vocabulary and chat template"


def write_adapter(args) -> str:
    """Write a LoRA adapter. Returns what was written."""
    gguf, base = gguf_package(), find_base(args.model_path, args.ori_model_dir)
    if bits := trained_bits(args.model_path):
        raise CheckpointError(
            f"{args.model_path} was trained on a base in {bits} bits, which llama.cpp's quantisation is not; merge it "
            "(merge_lora.py, also --into_quantized) and write the result"
        )
    adapter = read_adapter(args.model_path, "can be written as GGUF")
    if adapter.magnitudes or adapter.whole:
        kind = "of DoRA" if adapter.magnitudes else "with modules that were trained whole"
        raise CheckpointError(f"llama.cpp has no adapters {kind}; merge {args.model_path} with merge_lora.py")
    native = is_native(read_config(base))
    official = base_files(args.mode, base, native)
    update = Update(adapter.pairs, {})
    if native:
        print(printable(f"only names and shapes show whether {base} is the base of {args.model_path}"))
    else:
        print(printable(check_base(args.model_path, args.mode, base)))
    if is_native_adapter(update) != native:
        raise UserError(f"{args.model_path} is an adapter for models of another form than {base}")
    check_fit(update, weight_shapes(base), base)
    update = official_update(update, official.heads) if native else update

    def add_fields(writer) -> None:
        writer.add_type("adapter")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.scale * update.rank)

    tensors = adapter_tensors(official, update)
    with claimed_folder(args.output_dir) as partial:
        write_gguf(os.path.join(partial, ADAPTER_FILE), tensors, add_fields)
    print(f"verified: the {len(tensors)} tensors in {ADAPTER_FILE} are the weights of {printable(args.model_path)}")
    return f"{ADAPTER_FILE}, for the GGUF file of {base}"


def write(args) -> str:
    """Write what the flags name. Returns what was written.

    Raises:
        UserError, FolderError: gguf is not installed, the output exists, the disk has too little room, or flags do not
            fit the folder.
        CheckpointError: llama.cpp cannot have the model, it is broken, or the file is wrong.
    """
    gguf_package()
    check_new_folder(args.output_dir)
    if has_config(args.model_path):
        return write_model(args)
    if os.path.isfile(os.path.join(args.model_path, CONFIG)):
        if args.dtype:
            raise UserError("--dtype does nothing for an adapter, which is written in float32")
        return write_adapter(args)
    raise CheckpointError(f"{args.model_path} has no config.json: not a model's folder")


def main(argv=None) -> None:
    with exit_on_user_errors():
        args = parse_args(argv)
        silence_libraries(verbose=False)
        return_freed_memory()
        find_models(args, "model_path", "ori_model_dir", need=WEIGHTS)
        print(f"wrote {os.path.normpath(args.output_dir)}: {write(args)}; {args.model_path} is unchanged")


if __name__ == "__main__":
    main()
