"""Merge a LoRA adapter into its base model: a complete model folder that needs no peft.

    python merge_lora.py --mode glm3 --ori_model_dir ChatGLM3-6B/ --model_dir output-glm3/epoch-2-step-750

Weights go through memory one at a time; each sum is made in float32 and rounded once, to the type of the base.
"""

import argparse
import math
import os

import torch
from safetensors.torch import load_file

from folders import new_folder
from glm_models import MODE, check_family
from glm_models.checkpoint import read_json, read_weights, write_side_files, write_weights
from utils import UserError, clear_errors, load_tokenizer, quiet

PREFIX = "base_model.model."  # what peft puts before the names of the base model


def read_adapter(folder: str) -> tuple[dict, dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """A LoRA adapter as peft writes it.

    Returns:
        Its config; (A, B) by the name of the weight they add to, float32; the factor of the product B A.

    Raises:
        UserError: not a LoRA adapter, or one of a kind that is more than a product added to weights.
    """
    config_path = os.path.join(folder, "adapter_config.json")
    if not os.path.isfile(config_path):
        raise UserError(f"--model_dir {folder}: no adapter_config.json in it; not a LoRA result")
    config = read_json(config_path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{config_path}: peft_type is {config.get('peft_type')}, not LORA")
    plain = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}
    plain |= {"modules_to_save": None, "lora_bias": False}
    for key, value in plain.items():
        if (config.get(key) or value) != value:
            raise UserError(f"{config_path}: {key} is {config[key]}; only plain LoRA can be merged here")
    path = os.path.join(folder, "adapter_model.safetensors")
    if os.path.isfile(path):
        tensors = load_file(path)
    elif os.path.isfile(path := os.path.join(folder, "adapter_model.bin")):
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    else:
        raise UserError(f"--model_dir {folder}: no adapter_model.safetensors or adapter_model.bin in it")
    pairs = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors.get(name.replace(".lora_A.", ".lora_B."))
            if b is None:
                raise UserError(f"{path}: {name} has no lora_B beside it")
            pairs[name.removeprefix(PREFIX).replace(".lora_A.", ".")] = (a.float(), b.float())
    if 2 * len(pairs) != len(tensors):
        strange = next(name for name in tensors if ".lora_A." not in name and ".lora_B." not in name)
        raise UserError(f"{path}: {strange} is no LoRA weight")
    if all(not b.any() for _, b in pairs.values()):
        raise UserError(f"{path}: every lora_B is zero; the adapter was never trained, or saved empty")
    rank = config["r"]
    return config, pairs, config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def merge(mode: str, base: str, adapter: str, output: str) -> None:
    """Write base + adapter to `output`.

    Raises:
        UserError: output exists and is not empty or is one of the inputs, or the adapter does not fit the base.
    """
    if os.path.isdir(output) and os.listdir(output):
        raise UserError(f"--output_dir {output} is not empty; name another")
    check_family(base, mode)
    _, pairs, scale = read_adapter(adapter)
    tokenizer = load_tokenizer(mode, base)
    sizes = {name: (tensor.shape, tensor.numel() * tensor.element_size()) for name, tensor in read_weights(base)}
    for name, (a, b) in pairs.items():
        if name not in sizes:
            raise UserError(f"the adapter {adapter} adds to {name}, which {base} does not have: another base?")
        if (b.shape[0], a.shape[1]) != tuple(sizes[name][0]):
            raise UserError(
                f"the adapter {adapter} does not fit {name} of {base}, {list(sizes[name][0])}: another base?"
            )

    dtypes = set()

    def merged():
        for name, weight in read_weights(base):
            if name in pairs:
                a, b = pairs[name]
                weight = (weight.float() + scale * (b @ a)).to(weight.dtype)
            if weight.ndim == 2:
                dtypes.add(weight.dtype)
            yield name, weight

    # an output layer that was tied to the embedding no longer equals it
    config = {"tie_word_embeddings": False} if "lm_head.weight" in pairs else {}
    with new_folder(output) as partial:
        write_weights(partial, merged(), sum(size for _, size in sizes.values()))
        write_side_files(partial, base, max(dtypes, key=lambda t: t.itemsize), tokenizer.stop_token_ids, **config)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODE, required=True, help="model family")
    parser.add_argument("--ori_model_dir", required=True, help="the base model's folder")
    parser.add_argument("--model_dir", required=True, help="the adapter's folder, a result of --train_type lora")
    parser.add_argument("--output_dir", help="folder to write (default: the adapter's, with -merged appended)")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    quiet(verbose=False)
    output = args.output_dir or args.model_dir.rstrip("/") + "-merged"
    with clear_errors():
        merge(args.mode, args.ori_model_dir, args.model_dir, output)
        print(f"merged {args.model_dir} into {args.ori_model_dir}: {output}")


if __name__ == "__main__":
    main()
