"""Official checkpoint folders: reading and writing their files, and the fingerprint of the weights."""

import json
import os
import shutil
import unicodedata
import zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import MODE
from .families import FAMILIES, architectures_of

# The types that weights on disk may have, with their names in safetensors.
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}
DTYPES |= {torch.uint8: "U8", torch.bool: "BOOL"}


# Unicode categories of control characters, which could clear a terminal or fake a second line.
UNPRINTABLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used as asked; the message names the folder and what to do.

    Messages quote names and values from files, so control characters are escaped: a message is one line of text.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text with its control characters escaped."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in UNPRINTABLE else c for c in text)


def check_download(path: str) -> None:
    """Refuse what a failed download leaves in place of a file. The readers of a file find other damage.

    Raises:
        CheckpointError: the file is empty, a git-lfs pointer or a web page, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    start = head.lstrip().lower()
    if not head:
        raise CheckpointError(f"{path} is empty: the download was interrupted; download the file again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder, or download it again"
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not the file itself: download the file again")


def read_json(path: str) -> dict:
    """The object in a json file.

    Raises:
        CheckpointError: unreadable, not json, or not an object.
    """
    check_download(path)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # json and UTF-8 errors alike
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def weight_files(folder: str) -> list[str]:
    """The weight files of a checkpoint folder; safetensors are preferred to .bin.

    Raises:
        CheckpointError: there are none, or the index is broken, points outside the folder or names a missing file.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(folder, single)
        if os.path.isfile(path):
            return [path]
        if os.path.isfile(path + ".index.json"):
            return [os.path.join(folder, name) for name in sorted(set(_weight_map(folder, single).values()))]
    raise CheckpointError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor an index")


def _weight_map(folder: str, single: str) -> dict[str, str]:
    """The file of each weight, from the index of model.safetensors or pytorch_model.bin."""
    path = os.path.join(folder, single + ".index.json")
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{path}: "weight_map" must name the file of each weight')
    suffix = os.path.splitext(single)[1]
    for name, file in weight_map.items():
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(suffix):
            raise CheckpointError(f"{path}: {name} should be in {file!r}, which is not a {suffix} file of this folder")
        if not os.path.isfile(os.path.join(folder, file)):
            raise CheckpointError(f"{path} names {file}, which is missing")
    return weight_map


class WeightFile:
    """A memory-mapped weights file: a page is read when its tensor is. Only tensors are unpickled.

    Args:
        path: a .safetensors file, or a .bin that torch.save wrote.

    Raises:
        CheckpointError: it is broken, or holds something other than dense tensors of the types in DTYPES.
    """

    def __init__(self, path: str):
        self.path = path
        check_download(path)
        self.mapped = True
        if path.endswith(".safetensors"):
            try:
                self.file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is broken or not a weights file; download it again ({error})") from None
            self.names, self.get = list(self.file.keys()), self.file.get_tensor
        else:
            try:
                self.mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote another format
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=self.mapped)
            except Exception as error:  # a broken pickle can raise anything; torch's message suggests unsafe loading
                kind = type(error).__name__
                raise CheckpointError(
                    f"{path} is broken, or holds more than tensors; not loaded ({kind}). Download it again"
                ) from None
            if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
                raise CheckpointError(f"{path} is not a weights file: it does not hold tensors by name")
            self.names, self.get = list(tensors), tensors.__getitem__

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            tensor = self.get(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: {name}: {error}") from None
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.dtype not in DTYPES:
            what = f"tensor of type {tensor.dtype}" if plain else type(tensor).__name__
            raise CheckpointError(f"{self.path}: {name} is a {what}, not a dense tensor of a known type")
        # an expanded view may be far larger than its file
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{self.path}: {name} is larger than its storage")
        return tensor.detach()


def weight_layout(folder: str) -> dict[str, dict[str, tuple[torch.dtype, torch.Size]]]:
    """Type and shape of every weight of a folder: file -> name -> (type, shape). No weight is read.

    Raises:
        CheckpointError: a file is missing or broken, or does not match the index.
    """
    files = weight_files(folder)
    single = "model.safetensors" if files[0].endswith(".safetensors") else "pytorch_model.bin"
    weight_map = {} if os.path.basename(files[0]) == single else _weight_map(folder, single)
    layout, seen = {}, {}
    for path in files:
        file = WeightFile(path)
        layout[path] = {name: (file[name].dtype, file[name].shape) for name in file.names}
        for name in layout[path]:
            if seen.setdefault(name, path) != path:
                raise CheckpointError(f"{name} is both in {seen[name]} and in {path}")
    for name, file in weight_map.items():
        if name not in layout[os.path.join(folder, file)]:
            raise CheckpointError(f"{os.path.join(folder, file)} does not hold {name}, although the index says so")
    return layout


def weight_shapes(folder: str) -> dict[str, torch.Size]:
    """The shape of every weight of a folder. Raises CheckpointError: see weight_layout."""
    return {name: shape for names in weight_layout(folder).values() for name, (_, shape) in names.items()}


def read_weights(folder: str):
    """Yield (name, tensor) of all weights of a folder, one file open at a time.

    Raises:
        CheckpointError: see weight_layout.
    """
    for path, names in weight_layout(folder).items():
        file = WeightFile(path)
        for name in names:
            yield name, file[name]


class FolderWeights:
    """The weights of a folder by name, one file open at a time.

    Pages that were read count as this process's memory as long as the file is open, so it is opened again now and then.

    Raises:
        CheckpointError: see weight_layout.
    """

    MOST_READ = 2**25  # bytes after which a file is opened again

    def __init__(self, folder: str):
        self.where = {name: path for path, names in weight_layout(folder).items() for name in names}
        self.file: WeightFile | None = None
        self.read = 0

    def close(self) -> None:
        """Give the memory of the open file back; it is opened again when it is needed."""
        self.file = None

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self.where[name]
        if self.file is None or self.file.path != path or (self.file.mapped and self.read > self.MOST_READ):
            self.close()  # first, so that never two are open
            self.file, self.read = WeightFile(path), 0
        tensor = self.file[name]
        self.read += tensor.numel() * tensor.element_size()
        return tensor


def write_json(path: str, content) -> None:
    """Write json in the style of the official folders: indented, Chinese not escaped."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
        file.write("\n")


def write_weights(folder: str, tensors, total: int, max_shard_bytes: int = 4 * 2**30) -> None:
    """Write safetensors in the layout that transformers reads: one file, or shards with an index.

    Args:
        tensors: an iterator of (name, tensor on the CPU). Only one shard is held in memory.
        total: bytes of all tensors, for the index.
        max_shard_bytes: maximum size of a shard, except for a single larger tensor.
    """
    shard: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []  # names of the tensors in each file
    size = 0

    def flush():
        names.append(list(shard))
        path = os.path.join(folder, f"shard-{len(names)}")
        save_file(shard, path, metadata={"format": "pt"})
        os.chmod(path, 0o644)  # save_file makes files that only the owner can read
        shard.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > max_shard_bytes:
            flush()
            size = 0
        # a copy: save_file refuses views of shared memory, and the caller may reuse its buffer
        shard[name] = tensor.detach().clone().contiguous()
        size += nbytes
    flush()

    files = shard_names(len(names))
    for i, file in enumerate(files, 1):
        os.replace(os.path.join(folder, f"shard-{i}"), os.path.join(folder, file))
    write_index(folder, dict(zip(files, names, strict=True)), total)


def shard_names(count: int) -> list[str]:
    """Names of the files of a model's weights."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def total_bytes(layout: dict) -> int:
    """Bytes of all weights of a folder, from its weight_layout."""
    return sum(shape.numel() * dtype.itemsize for weights in layout.values() for dtype, shape in weights.values())


def matrix_dtype(layout: dict) -> torch.dtype:
    """The type of a folder's weights, from its weight_layout; norms and biases may have others."""
    dtypes = {dtype for weights in layout.values() for dtype, shape in weights.values() if len(shape) == 2}
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def write_index(folder: str, files: dict, size: int) -> None:
    """Write the index of a model's weights if they are in several files.

    Args:
        files: file -> names of its weights.
        size: bytes of all weights.
    """
    if len(files) == 1:
        return
    weight_map = {name: file for file, names in files.items() for name in names}
    write_json(
        os.path.join(folder, "model.safetensors.index.json"),
        {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))},
    )


def write_safetensors(path: str, layout: dict[str, tuple[torch.dtype, torch.Size]], parts) -> None:
    """Write one safetensors file without holding it in memory: https://huggingface.co/docs/safetensors, "Format".

    Args:
        layout: type and shape of each tensor.
        parts: name -> an iterator of CPU tensors that together, in order, hold the values of the tensor.

    Raises:
        ValueError: the parts of a tensor do not have its size.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = sorted(layout, key=lambda name: -layout[name][0].itemsize)  # so each tensor is aligned to its type
    for name in names:
        dtype, shape = layout[name]
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for part in parts(name):
                file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy())
            if file.tell() != 8 + len(text) + header[name]["data_offsets"][1]:
                raise ValueError(f"the parts of {name} do not have its size")


# Keys of generation_config.json that are copied into results; others make programs load code or other models.
GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "max_length", "max_new_tokens")
GENERATION_KEYS += ("num_beams", "temperature", "top_k", "top_p", "repetition_penalty", "transformers_version")
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# Files that a base may have beside these: tokens and template for transformers, and what ModelScope looks for.
MORE_FILES = ("added_tokens.json", "chat_template.jinja", "configuration.json")
LICENCES = ("LICENSE", "MODEL_LICENSE", "NOTICE")  # how the names of files begin that must go with copies


def is_side_file(name: str) -> bool:
    """Whether a file of a base goes into results unchanged: vocabulary, official code, tokenizer settings, licence."""
    return name.endswith((".py", ".model")) or name in (*TOKENIZER_FILES, *MORE_FILES) or name.startswith(LICENCES)


# What official configs of ChatGLM2 and ChatGLM3 name, then the class that transformers writes when it saves one. SGLang
# knows the first, LMDeploy the second, vLLM and llama.cpp both.
ARCHITECTURES = ["ChatGLMModel", "ChatGLMForConditionalGeneration"]


def write_side_files(folder: str, base: str, mode: str, dtype: torch.dtype, stop_ids: list[int], **changes) -> None:
    """Write all files of a model folder except the weights: config, tokenizer, generation config, official code.

    config.json is that of the base with `changes`, so that official code and other tools find every key, also
    `architectures` and `auto_map`. `_name_or_path` names the official model of the family: other programs recognise the
    vocabulary by it, and in a base that transformers wrote it would name a folder of another machine.

    Args:
        base: the folder of the base model.
        dtype: of the weights.
        stop_ids: ids that end an answer.
        changes: keys of config.json to override.
    """
    content = read_json(os.path.join(base, "config.json"))
    content = {key: value for key, value in content.items() if MODE[mode].config.is_copied(key)}
    official = f"THUDM/{FAMILIES[mode].title.lower()}"
    if official not in str(content.get("_name_or_path")):
        changes["_name_or_path"] = official
    if mode != "glm" and set(architectures_of(content)) <= set(ARCHITECTURES):
        changes["architectures"] = ARCHITECTURES
    content |= {"torch_dtype": str(dtype).removeprefix("torch."), **changes}
    write_json(os.path.join(folder, "config.json"), content)

    write_generation_config(folder, base, stop_ids, content)

    for name in os.listdir(base):
        path = os.path.join(base, name)
        if is_side_file(name) and os.path.isfile(path):
            check_download(path)
            shutil.copyfile(path, os.path.join(folder, name))
    path = os.path.join(folder, "tokenizer_config.json")
    content = read_json(path) if os.path.isfile(path) else {}
    if content.get("padding_side", "left") != "left":
        write_json(path, content | {"padding_side": "left"})


def write_generation_config(folder: str, base: str, stop_ids: list[int], ids: dict) -> None:
    """Write generation_config.json: the base's, as far as its keys are known, with the ids at which answers stop.

    Args:
        ids: may have bos_token_id and pad_token_id, for a base without them.
    """
    path = os.path.join(base, "generation_config.json")
    generation = read_json(path) if os.path.isfile(path) else {}
    generation = {key: generation[key] for key in GENERATION_KEYS if key in generation}
    generation |= {"eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]}
    for key in ("bos_token_id", "pad_token_id"):
        if ids.get(key) is not None:
            generation.setdefault(key, ids[key])
    write_json(os.path.join(folder, "generation_config.json"), generation)
