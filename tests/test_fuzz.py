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
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from conftest import TEXT, TINY
from safetensors.torch import save_file

import train
from adapter import read_adapter
from data_set import DataError, InstructionData, RowError, encode_sample, scan_rows
from ds_config import load_ds_config
from ds_keys import REFUSED, Key, Section, fits, is_one, walk
from folders import FolderError, new_folder
from glm_models import MODE, CheckpointError, check_family
from glm_models.tiny import make_tiny_checkpoint
from utils import UserError, load_base, load_tokenizer, quiet

ROOT = Path(__file__).resolve().parent.parent
CLEAR = (DataError, UserError, CheckpointError, FolderError)
LIMIT = 20  # seconds for one input, on a machine that may be busy
MEMORY = 2 * 2**30  # bytes that one input may add to the address space
SHARE = 240  # inputs of each kind under pytest

# The mutator


HOSTILE = [None, True, False, -1, 0, 1, 7, 3.5, 1e308, 10**30, 10**9, -(2**63), "", "auto", "12", "x" * 50, [], [1, 2]]
HOSTILE += [["a"], {}, {"a": 1}, [[[]]], "\ud83d", "\0", "../../x", float("nan"), float("inf"), "lora_A", "2" * 500]
SYNTAX = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"NaN",
    b"1e999",
]
SYNTAX += [b"\\ud83d", b"\\u0000", b"null", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, "水".encode(), "水".encode()[:2]]


def mutate_bytes(chance: random.Random, content: bytes, times: int = 1) -> bytes:
    """Flip, drop, repeat, insert or cut something."""
    for _ in range(times):
        start = chance.randrange(len(content) + 1)
        end = min(len(content), start + chance.choice((1, 1, 2, 8, 100)))
        part = content[start:end]
        new = chance.choice(
            (
                lambda part: bytes([part[0] ^ 1 << chance.randrange(8)]) + part[1:] if part else b"",
                lambda part: b"",
                lambda part: part * 2,
                lambda part: chance.choice(SYNTAX),
                lambda part: chance.choice(SYNTAX) + part,
                lambda part: chance.randbytes(len(part)),
                lambda part: part[::-1],
            )
        )(part)
        content = content[:start] + new + content[end:]
        if chance.random() < 0.05:
            content = content[: chance.randrange(len(content) + 1)]
    return content


def nodes(value, found=None) -> list[tuple]:
    """(container, key) of all that stands in a value."""
    found = [] if found is None else found
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        nodes(value[key], found)
    return found


def mutate_json(chance: random.Random, value: dict, keys: list[str]) -> dict:
    """Replace, drop, rename, wrap or swap values; `keys` are names that mean something to the reader."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        if not (places := nodes(value)):
            break
        container, key = chance.choice(places)
        action = chance.randrange(6)
        if action <= 1:
            container[key] = copy.deepcopy(chance.choice(HOSTILE))
        elif action == 2:
            del container[key]
        elif action == 3 and isinstance(container, dict):
            container[chance.choice(keys)] = copy.deepcopy(chance.choice(HOSTILE))
        elif action == 4:
            container[key] = chance.choice(([container[key]], {"a": container[key]}, str(container[key])))
        else:
            other, name = chance.choice(places)
            with contextlib.suppress(LookupError):  # it may be gone with what held it
                container[key] = copy.deepcopy(other[name])
    return value


def mutate_json_file(chance: random.Random, value: dict, keys: list[str]) -> bytes:
    """The bytes of a json file that is wrong in what it says, in how it is written, or both."""
    if chance.random() < 0.75:
        value = mutate_json(chance, value, keys)
    content = json.dumps(value, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    return mutate_bytes(chance, content) if chance.random() < 0.3 else content


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


class Fuzz:
    """What the kinds share.

    Args:
        folder: to work in.
        checkpoints: mode -> tiny checkpoint folder.
    """

    def __init__(self, folder: Path, checkpoints: dict[str, str]):
        self.folder, self.checkpoints = folder, checkpoints
        self.tokenizers = {mode: MODE[mode].tokenizer.from_pretrained(path) for mode, path in checkpoints.items()}
        self.ds_files = [json.loads(path.read_text()) for path in sorted(ROOT.glob("ds_zero*.json"))]
        args = train.parse_args(["--mode", "glm3", "--model_name_or_path", ".", "--train_path", __file__])
        self.ds_values = train.ds_values(args, 1, 10, 64)
        self.right = {}  # mode -> answers
        self.configs = {
            mode: json.loads((Path(path) / "config.json").read_text()) for mode, path in checkpoints.items()
        }

    # Instruction files

    def row(self, chance: random.Random) -> dict:
        number = chance.randrange(10**6)
        return {"instruction": "抽取故障：", "input": f"第{number}辆车\n水泵漏水。", "output": f"水泵_漏水{number}"}

    BREAKS = {  # ways to break the bytes of a row for certain, by kind of file that can go on after it
        "any": [
            lambda chance, text: (
                text[:-1] + b', "more": ' + chance.choice((b"NaN", b"-Infinity", b"[Infinity]")) + b"}"
            ),
            lambda chance, text: text[:-1] + b', "' + chance.choice((b"input", b"output")) + b'": "other"}',
            lambda chance, text: text[:-1] + b', "more": [{"a": 1, "a": 1}]}',
            lambda chance, text: text.replace("水".encode(), chance.choice((b"\xff", b"\xe6\xb0", b"\xed\xa0\x80")), 1),
            lambda chance, text: text.replace(
                "水".encode(), chance.choice((b"\\ud83d", b"\\ude00", b"\t", b"\x1f")), 1
            ),
            lambda chance, text: text.replace(chance.choice((b'"instruction"', b'"input"', b'"output"')), b'"Key"'),
            lambda chance, text: re.sub(b'"(input|output)": "[^"]*"', chance.choice(OTHER_TYPES), text, count=1),
            lambda chance, text: re.sub(b'"output": "[^"]*"', chance.choice(EMPTY), text),
            lambda chance, text: chance.choice((b"3", b"null", b"true", b'"text"', b"[]", b"{}", b"[" + text + b"]")),
        ],
        "lines": [  # in an array these hide what follows
            lambda chance, text: text[: chance.randrange(1, len(text))],
            lambda chance, text: text[chance.randrange(1, len(text)) :],
            lambda chance, text: text + chance.choice((b"}", b",", b"x", text, b"\0")),
            lambda chance, text: text.replace(b'": "', b'" "', 1),
            lambda chance, text: text.replace(b'", "', b'" "', 1),
            lambda chance, text: text.replace("水".encode(), b"\\x", 1),
            lambda chance, text: chance.choice((b"[", b'{"a":')) * chance.choice((1, 3000, 100_000)),
            lambda chance, text: b"\xef\xbb\xbf" * 2 + text,  # one is a byte order mark at the start of a file
        ],
    }

    def rows(self, chance: random.Random) -> None:
        """Rows broken on purpose never come out, the others do, with the samples that they have alone."""
        mode = chance.choice(list(MODE))
        tokenizer, is_array = self.tokenizers[mode], chance.random() < 0.3
        rows = [self.row(chance) for _ in range(chance.randrange(2, 12))]
        texts = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
        broken = {i for i in range(len(rows)) if chance.random() < 0.4}
        ends = None  # the row behind which an array cannot be read
        for i in sorted(broken):
            kinds = ["any"] if is_array and (ends is not None or chance.random() < 0.8) else ["any", "lines"]
            kind = chance.choice(kinds)
            if is_array and kind == "lines":
                ends, texts[i] = i, texts[i].replace(b'": "', b'" "', 1)
            else:
                texts[i] = chance.choice(self.BREAKS[kind])(chance, texts[i])
        blank = chance.choice((b"", b"\n", b" \n\r\n"))
        end = chance.choice((b"\n", b"\r\n"))
        content = b"\xef\xbb\xbf" * (chance.random() < 0.2)
        lines = []
        if is_array:
            content += b"["
        for i, text in enumerate(texts):
            content += (end if is_array and i == 0 else b"") + blank * (chance.random() < 0.2)
            lines.append(content.count(b"\n") + 1)
            content += text + (b"," if is_array and i < len(texts) - 1 else b"") + end
        if is_array:
            content += b"]" + end
        if not is_array and texts[0].lstrip().startswith(b"["):
            return  # means an array
        path = self.folder / "rows.json"
        path.write_bytes(content)
        right = [i for i in range(len(rows)) if i not in broken]
        if broken:
            with pytest.raises(DataError, match=f"line {lines[min(broken)]}: "):
                InstructionData(str(path), tokenizer, 200, 100)
        if not right or ends is not None:
            with pytest.raises(DataError):
                InstructionData(str(path), tokenizer, 200, 100, skip_bad=True)
            raise DataError
        try:
            data = InstructionData(str(path), tokenizer, 200, 100, skip_bad=True)
        except DataError as error:
            raise AssertionError(f"rows that are whole are refused: {error}") from error
        assert data.lines.tolist() == [lines[i] for i in right], (data.lines.tolist(), lines, broken)
        assert list(data.samples) == [encode_sample(tokenizer, rows[i], 200, 100) for i in right]

    def row_bytes(self, chance: random.Random) -> None:
        """A line that random changes of bytes missed comes out, and what comes out stands there."""
        rows = [self.row(chance) for _ in range(chance.randrange(1, 8))]
        texts = [json.dumps(row, ensure_ascii=chance.random() < 0.3).encode() for row in rows]
        content = b"[\n" + b",\n".join(texts) + b"\n]\n" if chance.random() < 0.3 else b"\n".join(texts) + b"\n"
        content = mutate_bytes(chance, content, chance.choice((1, 1, 2, 5)))
        path = self.folder / "bytes.json"
        path.write_bytes(content)
        found = dict(scan_rows(str(path)))  # raises where there is no row
        content = content.removeprefix(b"\xef\xbb\xbf")
        is_array = content.lstrip()[:1] == b"["
        by_line = dict(enumerate(content.split(b"\n"), 1))
        for line, row in found.items():
            if isinstance(row, RowError):
                assert f"line {line}: " in str(row)
                continue
            assert all(type(row[key]) is str for key in ("instruction", "input", "output"))
            assert (row["instruction"] + row["input"]).strip() and row["output"].strip()
            "".join(row[key] for key in ("instruction", "input", "output")).encode()
            if not is_array:
                assert json.loads(by_line[line].decode()) == row
        if not is_array:
            assert found.keys() == {line for line, text in by_line.items() if text.strip()}
            original = dict(zip(texts, rows, strict=True))
            for line, text in by_line.items():
                if text in original:
                    assert found[line] == original[text]
        InstructionData(str(path), self.tokenizers["glm3"], 200, 100, skip_bad=True)

    # Configs

    DS_KEYS = sorted({name.rpartition(".")[2] for name, _ in walk()}) + ["nonsense", "_comment"]

    def ds_file(self, chance: random.Random) -> None:
        """What is accepted has the types that the engine counts with."""
        path = self.folder / "ds.json"
        path.write_bytes(mutate_json_file(chance, chance.choice(self.ds_files), self.DS_KEYS))
        config = load_ds_config(str(path), self.ds_values, as_gpu=chance.random() < 0.5)
        assert type(config["zero_optimization"].get("stage")) is int
        assert type(config["bf16"]["enabled"]) is bool and type(config["fp16"]["enabled"]) is bool
        assert type(config.get("gradient_clipping", 1.0)) in (int, float, type(None))
        lr = config["optimizer"].get("params", {}).get("lr", 1.0)
        assert type(lr) in (int, float, bool) and lr >= 0
        assert config["train_batch_size"] == self.ds_values["train_batch_size"]

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
        load_ds_config(str(path), self.ds_values, as_gpu=chance.random() < 0.5)
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


OTHER_TYPES = [b'"\\1": ' + value for value in (b"null", b"3", b"true", b"{}", b'["a"]', b"1e3", b"[]")]
EMPTY = [b'"output": ' + value for value in (b'""', b'"  "', b'"\\\\n\\\\t"', '"\u3000"'.encode())]
KINDS = ("rows", "row_bytes", "ds_file", "ds_keys", "config", "checkpoint", "adapter_config", "adapter_weights")


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
    accepted = 0
    with bounded_memory():
        for i in range(SHARE):
            accepted += one_input(getattr(fuzz, kind), f"{kind} {i}")
    gc.collect()
    assert 0 < accepted < SHARE  # it does tell them apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="in all, of all kinds")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind; may be given more than once")
    parser.add_argument("--seed", default="", help="another one makes other inputs")
    args = parser.parse_args()
    quiet(verbose=False)
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
