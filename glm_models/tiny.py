"""Tiny random checkpoints in the official on-disk format, to try a change without 12 GB.

    python -m glm_models.tiny --mode glm3 --output tiny-glm3

The tokenizer is trained on --text (by default the texts of data/); the weights are random. By default there are 28 thin
layers, as many as in the real models, so that names like `layers.27.` exist.
"""

import argparse
import io
import json
import os
import sys

import sentencepiece
import torch

from tuning.arguments.parser import File, Integer, NewPath, Parser
from tuning.errors import UserError

from . import MODE
from .checkpoint import write_json, write_weights
from .families import FAMILIES
from .glm import GLMTokenizer

AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
}


def train_sentencepiece(lines: list[str], mode: str, vocab_size: int | None) -> bytes:
    """A SentencePiece model with the special pieces and settings of a family.

    Args:
        lines: the training text.
        vocab_size: number of pieces; None for one piece per character, with which small models learn fastest.
    """
    options = {"byte_fallback": True, "character_coverage": 1.0, "max_sentence_length": 1 << 20}
    if mode == "glm":
        blanks = [f"<|blank_{n}|>" for n in range(2, GLMTokenizer.MAX_BLANKS + 1)]
        controls = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
        options |= {
            "pad_id": 3,
            "pad_piece": "<pad>",
            "user_defined_symbols": ["<n>", "<|tab|>", *blanks],
            "control_symbols": controls,
            "normalization_rule_name": "nmt_nfkc",
        }
        lines = [line for text in lines for line in text.split("\n")]
        extra = 4 + len(blanks) + 2 + len(controls)
    else:
        options |= {
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "split_digits": True,
            "user_defined_symbols": ["\n"],
        }
        lines = [line for text in lines for line in text.split("\n")]
        extra = 4
    lines = [line for line in lines if line.strip()]
    normalizer = sentencepiece.SentencePieceNormalizer(rule_name=options["normalization_rule_name"])
    characters = set("".join(normalizer.normalize(line) for line in lines)) - {" ", "\n", "\t"}
    if vocab_size is None:
        vocab_size = len(characters) + 1 + 256 + extra  # the word mark, the bytes
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        minloglevel=2,
        num_threads=2,
        **options,
    )
    return model.getvalue()


def _official_name(mode: str) -> str:
    return "THUDM/" + FAMILIES[mode].title.lower()


def _tokenizer_config(mode: str) -> dict:
    """tokenizer_config.json, with the official keys."""
    content = {
        "name_or_path": _official_name(mode),
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    if mode == "glm":
        content |= {"num_image_tokens": 0, "gmask_token": "[gMASK]", "end_token": "</s>"}
        content |= {"bos_token": "<sop>", "eos_token": "<eop>", "mask_token": "[MASK]"}
        content |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    return content


def _glm_config(tokenizer, rows: int, hidden_size: int) -> dict:
    """Keys of config.json that only ChatGLM-6B has."""
    return {
        "vocab_size": rows,
        "inner_hidden_size": 4 * hidden_size,
        "max_sequence_length": 2048,
        "position_encoding_2d": True,
        "layernorm_epsilon": 1e-5,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "gmask_token_id": tokenizer.gmask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "use_cache": True,
    }


def _glm2_config(mode: str, rows: int, hidden_size: int, heads: int) -> dict:
    """Keys of config.json that ChatGLM2-6B and ChatGLM3-6B have."""
    defaults = MODE[mode].config()
    keys = ("add_bias_linear", "add_qkv_bias", "apply_residual_connection_post_layernorm", "attention_dropout")
    keys += ("fp32_residual_connection", "hidden_dropout", "layernorm_epsilon", "multi_query_attention")
    keys += ("multi_query_group_num", "original_rope", "post_layer_norm", "rmsnorm", "use_cache")
    keys += ("tie_word_embeddings", "eos_token_id", "pad_token_id", "seq_length")
    return {key: getattr(defaults, key) for key in keys} | {
        "apply_query_key_layer_scaling": True,
        "attention_softmax_in_fp32": True,
        "padded_vocab_size": rows,
        "kv_channels": hidden_size // heads,
        "ffn_hidden_size": -(-hidden_size * 8 // 3 // 16) * 16,
    }


def make_tiny_checkpoint(
    mode: str,
    output: str,
    lines: list[str],
    layers: int = 28,
    hidden_size: int = 64,
    heads: int = 4,
    vocab_size: int | None = None,
    seed: int = 1234,
    embedding_rows: int | None = None,
    **config,
) -> None:
    """Write a checkpoint folder of family `mode` with random float32 weights.

    Args:
        output: the folder; created if needed, must be empty.
        lines: text for the tokenizer.
        vocab_size: see `train_sentencepiece`.
        embedding_rows: rows of the embedding and the output layer; None for as many as the tokenizer needs.
        config: more keys for config.json.

    Raises:
        ValueError: output is not empty, or hidden_size does not fit heads.
    """
    if hidden_size % heads or hidden_size // heads % 8:
        raise ValueError(f"hidden_size {hidden_size} must be heads {heads} x a multiple of 8")
    os.makedirs(output, exist_ok=True)
    if os.listdir(output):
        raise ValueError(f"{output} is not empty")
    family = MODE[mode]
    vocabulary = os.path.join(output, FAMILIES[mode].vocabulary)
    with open(vocabulary, "wb") as file:
        file.write(train_sentencepiece(lines, mode, vocab_size))

    write_json(os.path.join(output, "tokenizer_config.json"), _tokenizer_config(mode))
    tokenizer = family.tokenizer.from_pretrained(output)
    rows = embedding_rows or -(-tokenizer.vocab_size // 16) * 16  # padded, like the official embeddings
    sizes = {"hidden_size": hidden_size, "num_layers": layers, "num_attention_heads": heads}
    more = _glm_config(tokenizer, rows, hidden_size) if mode == "glm" else _glm2_config(mode, rows, hidden_size, heads)
    common = {
        "_name_or_path": _official_name(mode),
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": AUTO_MAP,
        "torch_dtype": "float32",
    }
    write_json(os.path.join(output, "config.json"), common | sizes | more | config)

    torch.manual_seed(seed)
    model = family.model(family.config.from_pretrained(output))
    tensors = {**model.state_dict(), **model.official_buffers()}
    write_weights(output, tensors.items(), sum(t.numel() * t.element_size() for t in tensors.values()))


def read_lines(paths: list[str]) -> list[str]:
    """Training text for a tokenizer: the lines of text files, or all strings of instruction files."""
    lines = []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    row = line
                values = row.values() if isinstance(row, dict) else [row]
                for value in values:
                    lines += value if isinstance(value, list) else [value]
    return [line for line in lines if isinstance(line, str)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises UserError: see Parser.parse_args."""
    parser = Parser(__doc__)
    group = parser.group("checkpoint")
    group.add_argument("--mode", choices=MODE, required=True, help="model family: ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B")
    group.add_argument("--output", type=NewPath(), required=True, help="folder to write; must be empty or new")
    data = [f"data/{name}.json" for name in ("spo_0", "d2q_0")]
    group.add_argument(
        "--text", type=File(), nargs="+", default=data, default_text=" ".join(data),
        help="files with training text for the tokenizer",
    )  # fmt: skip
    group.add_argument("--layers", type=Integer(), default=28, help="number of layers")
    group.add_argument("--hidden_size", type=Integer(), default=64, help="hidden size: heads x a multiple of 8")
    group.add_argument("--heads", type=Integer(), default=4, help="number of attention heads")
    group.add_argument(
        "--vocab_size", type=Integer(), default_text="one per character", help="number of SentencePiece pieces"
    )
    group.add_argument("--seed", type=Integer(0, 2**32 - 1), default=1234, help="seed of the random weights")
    return parser.parse_args(argv)


def main(argv=None):
    try:
        args = parse_args(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        make_tiny_checkpoint(
            args.mode,
            args.output,
            read_lines(args.text),
            args.layers,
            args.hidden_size,
            args.heads,
            args.vocab_size,
            args.seed,
        )
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.output}: a random {FAMILIES[args.mode].title} with {args.layers} layers of width {args.hidden_size}")


if __name__ == "__main__":
    main()
