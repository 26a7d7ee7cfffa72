"""Broken and hostile files, made by a seeded mutator: each ends in one clear error or a right result, and soon.

    python tests/test_fuzz.py --inputs 10000         # in all, of all kinds; pytest takes a few hundred of each

What may not happen: an exception that is no clear error, an input that takes longer than LIMIT or fills the memory,
and a broken row, or broken weights, that are taken without a word.
"""

import argparse
import collections
import contextlib
import copy
import gc
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent / "support")]
import torch
from conftest import TEXT, TINY
from fuzz_rows import RowKinds
from mutator import HOSTILE, mutate_bytes, mutate_json_file
from safetensors.torch import save_file

import train
from glm_models import MODE, CheckpointError, check_family
from glm_models.tiny import make_tiny_checkpoint
from tuning.engine import ds_config
from tuning.engine.ds_config import load_ds_config
from tuning.engine.ds_keys import REFUSED, Key, Section, fits, is_one, walk
from tuning.engine.loading import load_base, load_tokenizer
from tuning.errors import DataError, FolderError, UserError
from tuning.folders import new_folder
from tuning.lora.adapter import read_adapter
from utils import silence_libraries

ROOT = Path(__file__).resolve().parent.parent
CLEAR = (DataError, UserError, CheckpointError, FolderError)
LIMIT = 20  # seconds for one input, on a machine that may be busy
MEMORY = 2 * 2**30  # bytes that one input may add to the address space
SHARE = 240  # inputs of each kind under pytest

# Values that a key of a ds file does not expect.
ODD = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    0.5,
    1e9,
    math.nan,
    math.inf,
    10**30,
    "",
    "auto",
    "cpu",
    "no",
    [],
    ["a"],
    [[1]],
    {},
]
ODD += [{"enabled": True}, {"enabled": False}, {"a": {"b": 1}}]

# Kinds of files: a function of a random generator, which makes one input, reads it and judges the result. It returns
# normally where the input was rightly accepted.


class Fuzz(RowKinds):
    """What the kinds share.

    Args:
        folder: to work in.
        checkpoints: mode -> tiny checkpoint folder.
    """

    def __init__(self, folder: Path, checkpoints: dict[str, str]):
        self.folder, self.checkpoints = folder, checkpoints
        self.tokenizers = {mode: MODE[mode].tokenizer.from_pretrained(path) for mode, path in checkpoints.items()}
        self.ds_files = [json.loads(path.read_text()) for path in sorted(ROOT.glob("ds_zero*.json"))]
        command = ["--mode", "glm3", "--model_name_or_path", ".", "--train_path", __file__]
        runs = [train.parse_args([*command, *more]) for more in ([], ["--pipeline_stages", "2"])]
        self.ds_values = [ds_config.ds_values(args, 1, 10, 64) for args in runs]
        self.right = {}  # mode -> answers
        self.configs = {
            mode: json.loads((Path(path) / "config.json").read_text()) for mode, path in checkpoints.items()
        }

    # Configs

    DS_KEYS = sorted({name.rpartition(".")[2] for name, _ in walk()}) + ["nonsense", "_comment"]

    def ds_file(self, chance: random.Random) -> None:
        """What is accepted has the types that the engine counts with."""
        path = self.folder / "ds.json"
        path.write_bytes(mutate_json_file(chance, chance.choice(self.ds_files), self.DS_KEYS))
        values = chance.choice(self.ds_values)
        config = load_ds_config(str(path), values, as_gpu=chance.random() < 0.5)
        assert type(config["zero_optimization"].get("stage")) is int
        assert type(config["bf16"]["enabled"]) is bool and type(config["fp16"]["enabled"]) is bool
        assert type(config.get("gradient_clipping", 1.0)) in (int, float, type(None))
        lr = config["optimizer"].get("params", {}).get("lr", 1.0)
        assert type(lr) in (int, float, bool) and lr >= 0
        assert config["train_batch_size"] == values["train_batch_size"]

    def ds_keys(self, chance: random.Random) -> None:
        """A key that is unknown, or has a value that is refused, is never accepted."""
        table = dict(walk())
        dotted = chance.choice(sorted(table))
        known, value = table[dotted], chance.choice(ODD)
        if chance.random() < 0.2:
            dotted, known = chance.choice((dotted + "s", dotted.replace("_", ""), f"{dotted}.{dotted}")), None
            known = table.get(dotted)
        elif isinstance(known, Key) and chance.random() < 0.5:
            value = chance.choice([known.default if known.default is not ... else None, *known.harmless, "auto"])
        config = copy.deepcopy(chance.choice(self.ds_files))
        *sections, name = dotted.split(".")
        holder = config
        for one in sections:
            holder[one] = holder = holder[one] if isinstance(holder.get(one), dict) else {}
        holder[name] = value
        path = self.folder / "ds.json"
        path.write_text(json.dumps(config))
        load_ds_config(str(path), chance.choice(self.ds_values), as_gpu=chance.random() < 0.5)
        inside = [table[name] for name in self.above(dotted) if isinstance(table.get(name), Section)]
        if any(section.why for section in inside):
            return  # a section that is off
        assert known is not None, f"{dotted} is unknown"
        if isinstance(known, Key) and known.kind == REFUSED:
            assert is_one(value, known.harmless), f"{dotted} {value!r}"
        elif isinstance(known, Key):
            assert value in ("auto", None) or fits(value, known.takes), f"{dotted} {value!r}"
        else:
            assert value is None or isinstance(value, dict), f"{dotted} {value!r}"

    @staticmethod
    def above(dotted: str) -> list[str]:
        """The sections that hold a key."""
        parts = dotted.split(".")
        return [".".join(parts[:i]) for i in range(1, len(parts))]

    CONFIG_KEYS = ["id2label", "num_labels", "dtype", "torch_dtype", "auto_map", "architectures", "pre_seq_len"]
    CONFIG_KEYS += ["rope_scaling", "model_type", "quantization_bit", "output_attentions", "return_dict", "to_dict"]
    CONFIG_KEYS += ["transformers_version", "problem_type", "num_hidden_layers", "per_layer_config", "num_groups"]
    CONFIG_KEYS += ["attn_implementation", "_attn_implementation", "configuration_files", "max_length", "head_dim"]
    CONFIG_KEYS += ["name_or_path", "rope_parameters", "is_encoder_decoder", "chunk_size_feed_forward", "_commit_hash"]

    def config(self, chance: random.Random) -> None:
        """What is accepted makes a network."""
        mode = chance.choice(list(MODE))
        folder = self.folder / f"config-{mode}"
        if not folder.exists():
            folder.mkdir()
            for file in Path(self.checkpoints[mode]).iterdir():
                if file.suffix != ".safetensors":
                    (folder / file.name).write_bytes(file.read_bytes())
        keys = [*self.CONFIG_KEYS, *self.configs[mode]]
        (folder / "config.json").write_bytes(mutate_json_file(chance, self.configs[mode], keys))
        check_family(str(folder), mode)
        config = MODE[mode].config.from_pretrained(str(folder), use_cache=False)
        with torch.device("meta"):
            model = MODE[mode].model(config)
        assert len(list(model.parameters())) > 2 * config.num_layers
        assert all(math.isfinite(weight.numel()) for weight in model.parameters())

    # Whole folders

    FOREIGN = [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 10\n",
        b"<html>404</html>",
        b"",
        b"{}",
    ]
    FOREIGN += [b"IQ== 0\nIg== 1\n", b"PK\x03\x04" + bytes(40), b"\x1f\x8b" + bytes(40), b"[" * 100_000, b"\xff" * 99]
    FOREIGN += [b'{"error": "Repository not found"}', b'{"weight_map": {"a": "b"}}', b"null", b"[]"]
    MORE_FILES = ["adapter_config.json", "adapter_model.safetensors", "generation_config.json", "added_tokens.json"]
    MORE_FILES += [
        "tokenizer.json",
        "special_tokens_map.json",
        "tokenization_chatglm.py",
        "model.safetensors.index.json",
    ]
    MORE_FILES += ["chat_template.jinja", "pytorch_model.bin", "custom_generate"]
    ODD_KEYS = {
        "config.json": ["quantization_config", "transformers_weights", "experts_implementation", "tp_plan", "auto_map"],
        "tokenizer_config.json": ["padding_side", "truncation_side", "eos_token", "pad_token", "num_image_tokens"],
        "generation_config.json": [
            "eos_token_id",
            "pad_token_id",
            "num_beams",
            "do_sample",
            "stop_strings",
            "max_length",
        ],
    }
    ODD_KEYS["config.json"] += [
        "rope_scaling",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "pre_seq_len",
        "id2label",
    ]
    ODD_KEYS["config.json"] += ["quantization_bit", "num_beams", "prefix_projection", "attention_bias", "mask_token_id"]
    ODD_KEYS["tokenizer_config.json"] += ["init_inputs", "added_tokens_decoder", "do_lower_case", "chat_template", "a"]
    ODD_KEYS["tokenizer_config.json"] += [
        "extra_special_tokens",
        "encode_special_tokens",
        "tokenizer_class",
        "unk_token",
    ]
    ODD_KEYS["generation_config.json"] += [
        "assistant_model",
        "watermarking_config",
        "cache_implementation",
        "min_length",
    ]

    def break_folder(self, chance: random.Random, folder: Path, original: Path) -> None:
        """One file becomes another's, is cut, or gets an odd key; or one more file lies there."""
        names = sorted(file.name for file in folder.iterdir())
        way = chance.choice(("key", "key", "key", "foreign", "cut", "more", "lost"))
        if way == "key":
            name = chance.choice(list(self.ODD_KEYS))
            content = json.loads((original / name).read_text()) if (original / name).exists() else {}
            content[chance.choice(self.ODD_KEYS[name])] = chance.choice(HOSTILE)
            changed = json.dumps(content).encode("utf-8", "surrogatepass")
        else:
            name = chance.choice(self.MORE_FILES if way == "more" else names)
            content = (folder / name).read_bytes() if name in names else b""
            changed = content[: chance.randrange(len(content) + 1)] if way == "cut" else chance.choice(self.FOREIGN)
        (folder / name).unlink(missing_ok=True)  # it may be a link to the original
        if way != "lost":
            (folder / name).write_bytes(changed)

    def checkpoint(self, chance: random.Random) -> None:
        """What is accepted gives the prompts, logits and answers of the folder that it was before."""
        mode = chance.choice(list(MODE))
        folder = self.folder / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in Path(self.checkpoints[mode]).iterdir():
            os.link(file, folder / file.name)
        for _ in range(chance.choice((1, 1, 2))):
            self.break_folder(chance, folder, Path(self.checkpoints[mode]))
        found = self.answers(mode, str(folder))
        if mode not in self.right:
            self.right[mode] = self.answers(mode, self.checkpoints[mode])
        prompts, logits, answer = self.right[mode]
        assert found[0] == prompts and found[1].equal(logits) and found[2].equal(answer)

    @staticmethod
    def answers(mode: str, folder: str):
        tokenizer = load_tokenizer(mode, folder)
        model = load_base(mode, folder, torch.float32).eval()
        prompts = [tokenizer.encode_prompt(text) for text in ("水泵漏水", "发动机怠速不稳，[gMASK] </s>\n")]
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits
        stop = {"eos_token_id": tokenizer.stop_token_ids, "pad_token_id": tokenizer.pad_token_id}
        return prompts, logits, model.generate(**batch, **stop, do_sample=False, max_new_tokens=3)

    # Adapters

    ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"], "bias": "none"}
    ADAPTER |= {"use_rslora": False, "lora_dropout": 0.1, "base_model_name_or_path": "base", "task_type": "CAUSAL_LM"}
    ADAPTER |= {"init_lora_weights": True, "rank_pattern": {}, "modules_to_save": None, "use_dora": False}

    @staticmethod
    def lora_weights(chance: random.Random) -> dict[str, torch.Tensor]:
        layer = "base_model.model.transformer.encoder.layers.{}.self_attention.query_key_value.lora_{}.weight"
        generator = torch.Generator().manual_seed(chance.randrange(2**32))
        weights = {}
        for i in range(2):
            weights[layer.format(i, "A")] = torch.randn(4, 16, generator=generator)
            weights[layer.format(i, "B")] = torch.randn(24, 4, generator=generator)
        return weights

    def write_adapter(self, chance: random.Random, is_bin: bool) -> Path:
        folder = self.folder / "adapter"
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        (folder / "adapter_config.json").write_text(json.dumps(self.ADAPTER))
        if is_bin:
            torch.save(self.lora_weights(chance), folder / "adapter_model.bin")
        else:
            save_file(self.lora_weights(chance), str(folder / "adapter_model.safetensors"))
        return folder

    @staticmethod
    def check_adapter(folder: Path) -> None:
        adapter = read_adapter(str(folder))
        assert math.isfinite(adapter.scale) and adapter.scale > 0
        for a, b in adapter.pairs.values():
            assert a.isfinite().all() and b.isfinite().all() and a.shape[0] == b.shape[1]
            a.sum(), b.sum()  # all of it can be read
        assert any(a.any() for a, _ in adapter.pairs.values()) and any(b.any() for _, b in adapter.pairs.values())

    def adapter_config(self, chance: random.Random) -> None:
        """What is accepted is a plain adapter of the rank that the weights have."""
        folder = self.write_adapter(chance, is_bin=False)
        keys = [*self.ADAPTER, "alpha_pattern", "lora_bias", "fan_in_fan_out", "use_qalora", "layer_replication"]
        content = mutate_json_file(chance, self.ADAPTER, keys)
        (folder / "adapter_config.json").write_bytes(content)
        self.check_adapter(folder)
        config = json.loads(content)
        assert config["r"] == 4 and config["peft_type"] == "LORA"
        assert not config.get("use_dora") and not config.get("rank_pattern") and not config.get("modules_to_save")

    def adapter_weights(self, chance: random.Random) -> None:
        """What is accepted is finite and not zero; under a manifest, not a byte differs."""
        is_bin = chance.random() < 0.4
        folder = self.write_adapter(chance, is_bin)
        path = folder / ("adapter_model.bin" if is_bin else "adapter_model.safetensors")
        content = path.read_bytes()
        if not is_bin and chance.random() < 0.5:  # the header says where the tensors lie
            size = int.from_bytes(content[:8], "little")
            header = mutate_json_file(chance, json.loads(content[8 : 8 + size]), ["dtype", "shape", "data_offsets"])
            changed = len(header).to_bytes(8, "little") + header + content[8 + size :]
        else:
            changed = mutate_bytes(chance, content, chance.choice((1, 1, 3)))
        if chance.random() < 0.3:
            with new_folder(str(self.folder / "sealed")) as partial:
                for file in folder.iterdir():
                    (Path(partial) / file.name).write_bytes(file.read_bytes())
            (self.folder / "sealed" / path.name).write_bytes(changed)
            if changed != content:
                with pytest.raises(FolderError):
                    read_adapter(str(self.folder / "sealed"))
        path.write_bytes(changed)
        self.check_adapter(folder)

    def adapter_files(self, chance: random.Random) -> None:
        """A pointer, a page or another program's file in the place of one of an adapter's, or beside them."""
        is_bin = chance.random() < 0.3
        folder = self.write_adapter(chance, is_bin)
        names = [
            *(file.name for file in folder.iterdir()),
            "README.md",
            "training_args.bin",
            "optimizer.pt",
            "base.json",
        ]
        name = chance.choice(names)
        is_needed = name.startswith("adapter_")
        if is_needed and chance.random() < 0.2:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(chance.choice(self.FOREIGN))
        mode = chance.choice(list(MODE))
        with pytest.raises(CheckpointError, match=r"is a LoRA adapter|config\.json"):  # in the place of a base
            load_base(mode, str(folder), torch.float32)
        self.check_adapter(folder)
        assert not is_needed


KINDS = (
    "rows",
    "row_bytes",
    "row_keys",
    "row_conversations",
    "row_files",
    "ds_file",
    "ds_keys",
    "config",
    "checkpoint",
    "adapter_config",
    "adapter_weights",
    "adapter_files",
)


class Hang(BaseException):
    """An input took longer than LIMIT."""


def one_input(kind, seed: str) -> bool:
    """Whether the input was accepted; any exception but a clear error passes through."""

    def too_late(*_):
        raise Hang(f"{seed}: more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        kind(random.Random(seed))
        return True
    except CLEAR as error:
        message = str(error)
        assert "\n" not in message and "Traceback" not in message and len(message) < 2000, message
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def bounded_memory():
    """Let this process grow by MEMORY at most."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def fuzz(tiny, tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"), tiny)


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_end_in_one_clear_error_or_a_right_result(fuzz, kind):
    accepted, share = 0, SHARE // 2 if kind.startswith("row_") else SHARE  # these read each file twice
    with bounded_memory():
        for i in range(share):
            accepted += one_input(getattr(fuzz, kind), f"{kind} {i}")
    gc.collect()
    assert 0 < accepted < share  # it does tell them apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="in all, of all kinds")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind; may be given more than once")
    parser.add_argument("--seed", default="", help="another one makes other inputs")
    args = parser.parse_args()
    silence_libraries(verbose=False)
    kinds, failures, start = args.kind or KINDS, collections.Counter(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {mode: f"{folder}/{mode}" for mode in MODE}
        for mode, path in checkpoints.items():
            make_tiny_checkpoint(mode, path, TEXT, **TINY[mode])
        fuzz = Fuzz(Path(folder), checkpoints)
        print(f"{'kind':16} {'inputs':>7} {'accepted':>9} {'refused':>8} {'failed':>7} {'slowest':>8}")
        for place, kind in enumerate(kinds):
            inputs = args.inputs // len(kinds) + (place < args.inputs % len(kinds))
            accepted = failed = slowest = 0
            with bounded_memory():
                for i in range(inputs):
                    began, seed = time.time(), f"{args.seed}{kind} {i}"
                    try:
                        accepted += one_input(getattr(fuzz, kind), seed)
                    except (Exception, Hang, pytest.fail.Exception) as error:
                        failed += 1
                        text = f"{type(error).__name__}: {ascii(str(error))[:300]}"
                        failures[type(error).__name__] += 1
                        print(f"  {seed}: {text}")
                    slowest = max(slowest, time.time() - began)
            print(f"{kind:16} {inputs:7} {accepted:9} {inputs - accepted - failed:8} {failed:7} {slowest:6.2f} s")
    print(f"{args.inputs} inputs in {time.time() - start:.0f} s: {failures.total()} failures {dict(failures) or ''}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
