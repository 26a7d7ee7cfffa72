"""Main memory that merge_lora.py takes at the most, with and without the comparison after it.

    python tests/benchmark/merge_memory.py [--mode glm3] [--bin]

Makes a random float16 checkpoint of more than 2 GB in several shards and a LoRA adapter on all its linear layers, and
merges them in processes of their own. Prints JSON, bytes: `rss` is all that is resident (VmHWM), pages of mapped files
too; `private` the most of it that is not (RssAnon, sampled every 5 ms); `bound` is 1.3 x the largest shard + the
adapter + 0.5 GB. Linux only.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
from peft import LoraConfig, get_peft_model

from glm_models import MODE
from glm_models.checkpoint import weight_layout, write_json, write_weights
from glm_models.tiny import make_tiny_checkpoint, read_lines
from tuning.lora.adapter import BASE_FILE, record_base

MODULES = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def make(mode: str, work: Path, layers: int, hidden_size: int, shard: int, as_bin: bool) -> None:
    """work/base and work/adapter."""
    small, base = work / "small", work / "base"
    rows = 130528 if mode == "glm" else 65024
    make_tiny_checkpoint(mode, str(small), read_lines([str(ROOT / "data/spo_0.json")]), 1, 64, 4)
    config = json.loads((small / "config.json").read_text())
    config |= {"hidden_size": hidden_size, "num_layers": layers, "num_attention_heads": hidden_size // 128}
    wide = {"inner_hidden_size": 4 * hidden_size, "vocab_size": rows}
    if mode != "glm":
        wide = {"ffn_hidden_size": hidden_size * 107 // 32, "kv_channels": 128, "padded_vocab_size": rows}
    shutil.copytree(small, base, ignore=shutil.ignore_patterns("*.safetensors"))
    write_json(str(base / "config.json"), config | wide | {"torch_dtype": "float16"})
    torch.set_default_dtype(torch.float16)
    try:
        model = MODE[mode].model(MODE[mode].config.from_pretrained(base))
        tensors = {**model.state_dict(), **model.official_buffers()}
        write_weights(str(base), tensors.items(), sum(t.numel() * t.element_size() for t in tensors.values()), shard)
        model.name_or_path = str(base)  # goes into the adapter
        adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=64, target_modules=MODULES))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(work / "adapter")
    if as_bin:
        to_bin(base)
    write_json(str(work / "adapter" / BASE_FILE), record_base(mode, str(base), torch.float16))


def to_bin(base: Path) -> None:
    """The same shards as torch.save writes them."""
    from safetensors.torch import load_file

    index = json.loads((base / "model.safetensors.index.json").read_text())
    for path in sorted(base.glob("*.safetensors")):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    index["weight_map"] = {name: file.replace(".safetensors", ".bin") for name, file in index["weight_map"].items()}
    write_json(str(base / "pytorch_model.bin.index.json"), index)
    (base / "model.safetensors.index.json").unlink()


def measure(command: list[str]) -> dict[str, float]:
    """Run a command and watch its memory."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    most = {"VmHWM": 0, "RssAnon": 0}
    while process.poll() is None:
        try:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in most:
                    most[key] = max(most[key], int(value.split()[0]) * 1024)
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            pass
        time.sleep(0.005)
    said = process.stdout.read()
    if process.returncode:
        sys.exit(f"{command} failed:\n{said}")
    result = {"rss": most["VmHWM"], "private": most["RssAnon"], "seconds": round(time.perf_counter() - start, 1)}
    return result | {"said": [line for line in said.splitlines() if "verified" in line]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODE, default="glm3")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden_size", type=int, default=2048)
    parser.add_argument("--shard", type=float, default=0.6, help="most GB of a shard")
    parser.add_argument("--bin", action="store_true", help="shards as torch.save writes them")
    parser.add_argument("--folder", help="where the checkpoint is made (default: the temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = Path(folder)
        make(args.mode, work, args.layers, args.hidden_size, int(args.shard * 1e9), args.bin)
        shards = [path.stat().st_size for path in map(Path, weight_layout(str(work / "base")))]
        adapter = (work / "adapter/adapter_model.safetensors").stat().st_size
        result = {"checkpoint": sum(shards), "shards": len(shards), "largest_shard": max(shards), "adapter": adapter}
        result["bound"] = int(1.3 * max(shards) + adapter + 0.5e9)
        result["imports"] = measure(["-c", "import merge_lora"])
        for name, flags in (("merge", ["--no_verify"]), ("merge_and_verify", [])):
            command = f"merge_lora.py --mode {args.mode} --ori_model_dir {work}/base --model_dir {work}/adapter"
            result[name] = measure([*command.split(), "--output_dir", f"{work}/{name}", *flags])
            shutil.rmtree(work / name)
    print(json.dumps(result, indent=2, ensure_ascii=False))
    if result["merge"]["rss"] > result["bound"]:
        sys.exit("the merge took more than the bound")


if __name__ == "__main__":
    main()
