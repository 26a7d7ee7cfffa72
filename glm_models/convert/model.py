"""Whole models in both directions: what is read and refused, written, and verified."""

import os
import shutil
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from .. import MODE
from ..checkpoint import (
    CheckpointError,
    FolderWeights,
    WeightFile,
    check_download,
    is_side_file,
    matrix_dtype,
    read_json,
    weight_layout,
    write_generation_config,
    write_json,
    write_side_files,
)
from ..families import FAMILIES
from ..glm2 import ChatGLM2Config, ChatGLM2Tokenizer
from ..identify import check_family, check_ids
from ..pretrained import check_not_quantised, has_lost_prefix
from ..streamed import QUESTIONS, differences, rms, skeleton, stream_logits
from .config import check_same_network, native_config, native_skeleton
from .names import Heads
from .tokenizer import write_tokenizer
from .weights import NativeView, OfficialView, compare_view, is_computed, native_files, write_view

KEPT = "official"  # a folder in the converted one: the official files, for the way back
ODD_TEXTS = ("", " ", "  a  b\t\n\n c ", "１２ mixed 中文，English; x = [1, 2]\r\n", "▁▁ ▁a", "<|user|> sop </s>")
ODD_TEXTS += ("😀👩\u200d👧 𠮷 ﷽ \x00\x1b\u2028\ufeff",)


class Official(NamedTuple):
    """What the official side files of a model say, its own or those that a converted model will get."""

    folder: str
    mode: str
    config: ChatGLM2Config
    tokenizer: ChatGLM2Tokenizer

    @classmethod
    def read(cls, mode: str, folder: str) -> "Official":
        """Read config and tokenizer; prints what looks odd.

        Raises:
            CheckpointError: of another family, of a kind that GlmForCausalLM does not compute, or broken.
        """
        check_family(folder, mode)
        config = MODE[mode].config.from_pretrained(folder)
        check_not_quantised(config)
        tokenizer = MODE[mode].tokenizer.from_pretrained(folder)
        for odd in check_ids(config, tokenizer, folder):
            print(f"warning: {odd}")
        return cls(folder, mode, config, tokenizer)

    def native(self, dtype: torch.dtype) -> dict:
        """config.json of the GlmForCausalLM with weights of this type."""
        return native_config(self.config, self.tokenizer.stop_token_ids, dtype)

    @property
    def heads(self) -> Heads:
        return Heads.of(self.config)


def refuse_prefix(official: Official, program: str = "GlmForCausalLM") -> None:
    """Refuse a P-Tuning result.

    Args:
        program: what cannot have a prefix, for the message.

    Raises:
        CheckpointError: it is one; the message says what serves it.
    """
    if official.config.pre_seq_len is not None and not has_lost_prefix(official.folder):
        raise CheckpointError(
            f"{official.folder} is a P-Tuning result, and {program} has no place for its prefix; predict.py, the "
            f"official code of {FAMILIES[official.mode].title} and chatglm.cpp answer with it as it is"
        )


def float_dtype(folder: str) -> torch.dtype:
    """The type of a folder's matrices.

    Raises:
        CheckpointError: it is not one of floating point.
    """
    dtype = matrix_dtype(weight_layout(folder))
    if not dtype.is_floating_point:
        raise CheckpointError(f"the weights in {folder} are {dtype}; only those of floating point are converted")
    return dtype


# Official -> GlmForCausalLM


def write_native(folder: str, official: Official, view: NativeView) -> None:
    """Write the folder of a GlmForCausalLM, and the official files below it."""
    content = official.native(float_dtype(official.folder))
    _keep(official.folder, os.path.join(folder, KEPT))  # before the large files: it may find a broken one
    write_tokenizer(folder, official.tokenizer, official.config.seq_length)
    write_json(os.path.join(folder, "config.json"), content)
    write_generation_config(folder, official.folder, official.tokenizer.stop_token_ids, content)
    write_view(folder, view)


def _keep(folder: str, kept: str) -> None:
    """Copy the official files that have no place in the other form: side files, and weights that models compute."""
    os.makedirs(kept)
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name == "__init__.py" and not os.path.getsize(path):
            continue  # made by hand
        if os.path.isfile(path) and (is_side_file(name) or name in ("config.json", "generation_config.json")):
            check_download(path)
            shutil.copyfile(path, os.path.join(kept, name))
    layout = weight_layout(folder)
    for path, file in native_files(layout).items():
        if names := [name for name in layout[path] if is_computed(name)]:
            weights, copy = WeightFile(path), os.path.join(kept, file)
            save_file({name: weights[name].clone() for name in names}, copy, metadata={"format": "pt"})
            os.chmod(copy, 0o644)  # save_file makes files that only the owner can read


def verify_native(folder: str, official: Official) -> list[str]:
    """Compare a written GlmForCausalLM with the official folder that it was made of. Returns lines for the user.

    Raises:
        CheckpointError: a weight, an id or the logits differ.
    """
    count = compare_view(OfficialView(folder, official.heads), official.folder)
    checked = compare_tokenizers(folder, official.tokenizer)
    return [
        f"verified: the {count} weights on disk are those of {official.folder}, bit for bit",
        f"verified: tokenizer.json gives the ids of {os.path.basename(official.tokenizer.vocab_file)} for its pieces "
        f"and other texts ({checked}), chat_template.jinja the official prompts",
        compare_outputs(official, skeleton(official.mode, official.folder), FolderWeights(official.folder), folder),
    ]


def compare_tokenizers(folder: str, tokenizer: ChatGLM2Tokenizer) -> int:
    """Compare the ids of a written tokenizer with the official ones. Returns the number of texts.

    Raises:
        CheckpointError: some differ.
    """
    fast = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    pieces = map(tokenizer.sp_model.IdToPiece, range(tokenizer.sp_model.GetPieceSize()))
    texts = [*QUESTIONS, *ODD_TEXTS, *(piece.replace("▁", " ") for piece in pieces)]
    found = fast(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, here, right in zip(texts, found, tokenizer.encode_texts(texts), strict=True):
        if here != right.tolist():
            raise CheckpointError(f"{folder}/tokenizer.json gives other ids than {tokenizer.vocab_file} for {text!r}")
    for question in QUESTIONS:
        asked, history = [{"role": "user", "content": question}], None
        if tokenizer.mode == "glm3":
            history = [{"role": "system", "content": question, "tools": [{"name": "查询"}]}]
        ids = fast.apply_chat_template([*(history or []), *asked], add_generation_prompt=True)["input_ids"]
        if ids != tokenizer.encode_prompt(question, history):
            raise CheckpointError(f"{folder}/chat_template.jinja does not give the official prompt of {question!r}")
    return len(texts)


def compare_outputs(official: Official, network, weights, native: str) -> str:
    """Compare the logits of both forms on QUESTIONS in float32: the order of sums may differ, nothing else.

    Args:
        network: the official one, on the meta device.
        weights: its weights, by name.
        native: the folder of the GlmForCausalLM.

    Returns:
        A line with the measured differences.

    Raises:
        CheckpointError: their root mean square is more than 1e-5 of that of the logits.
    """
    batch = official.tokenizer.pad(
        {"input_ids": [official.tokenizer.encode_prompt(text) for text in QUESTIONS]}, return_tensors="pt"
    )
    other = native_skeleton(native, official.native(torch.float32)), FolderWeights(native)
    logits = []
    for model, read in ((network, weights), other):
        logits.append(stream_logits(model, batch, read.__getitem__))
        read.close()
    line = "logits of both forms on " + differences(*logits)
    if not rms(logits[0] - logits[1]) <= 1e-5 * rms(logits[0]):
        raise CheckpointError(f"the converted model is not the one it was made of, nothing was kept; {line}")
    return "verified: " + line


# GlmForCausalLM -> official


def open_native(folder: str, official: Official) -> OfficialView:
    """The weights of a GlmForCausalLM's folder under their official names.

    Raises:
        CheckpointError: it is another network than `official` describes, or broken.
    """
    check_same_network(folder, official.config, official.folder)
    native_skeleton(folder, official.native(torch.float32))
    return OfficialView(folder, official.heads, official.folder if is_kept(official.folder, folder) else None)


def is_kept(official: str, native: str) -> bool:
    """Whether a folder is the one with the official files inside a GlmForCausalLM's folder."""
    return os.path.realpath(official) == os.path.realpath(os.path.join(native, KEPT))


def write_official(folder: str, official: Official, native: str, view: OfficialView) -> None:
    """Write an official folder: the weights of `native`, everything else as in official.folder."""
    dtype = float_dtype(native)
    write_view(folder, view)
    if not is_kept(official.folder, native):
        write_side_files(folder, official.folder, official.mode, dtype, official.tokenizer.stop_token_ids)
        return
    for name in os.listdir(official.folder):
        path = os.path.join(official.folder, name)
        if os.path.isfile(path) and not name.endswith(".safetensors"):
            shutil.copyfile(path, os.path.join(folder, name))
    content, name = read_config(folder), str(dtype).removeprefix("torch.")
    if content.get("torch_dtype", name) != name:  # another program has saved the weights in another type
        write_json(os.path.join(folder, "config.json"), content | {"torch_dtype": name})


def verify_official(folder: str, official: Official, native: str) -> list[str]:
    """Compare a written official folder with the GlmForCausalLM that it was made of: see verify_native."""
    count = compare_view(NativeView(folder, official.heads), native)
    return [
        f"verified: the {count} weights on disk are those of {native}, bit for bit",
        compare_outputs(official, skeleton(official.mode, folder), FolderWeights(folder), native),
    ]


def official_files(mode: str, native: str, named: str | None) -> Official:
    """Where the files come from that a GlmForCausalLM lacks: the folder that is named, else the one kept in it.

    Raises:
        CheckpointError: there is none, or see Official.read.
    """
    folder = named or os.path.join(native, KEPT)
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"{native} has no folder {KEPT} with the official config and tokenizer, as this script writes it; name an "
            f"official {FAMILIES[mode].title} folder with --ori_model_dir"
        )
    return Official.read(mode, folder)


def base_files(mode: str, base: str, native: bool) -> Official:
    """Config and tokenizer of the base of a converted adapter, which may be of either form."""
    if native and not os.path.isdir(os.path.join(base, KEPT)):
        raise CheckpointError(
            f"{base} has no folder {KEPT}, which tells how query_key_value is cut; copy it there from the folder that "
            "this script wrote"
        )
    return official_files(mode, base, None) if native else Official.read(mode, base)


def has_config(folder: str) -> bool:
    """Whether a folder has a config.json."""
    return os.path.isfile(os.path.join(folder, "config.json"))


def read_config(folder: str) -> dict:
    """The config.json of a folder. Raises CheckpointError if there is none, or it is broken."""
    return read_json(os.path.join(folder, "config.json"))
