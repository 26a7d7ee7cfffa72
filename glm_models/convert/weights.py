"""The weights of a folder as they are in the other form, one at a time, and a folder written from them."""

import os

import torch

from ..checkpoint import (
    CheckpointError,
    FolderWeights,
    WeightFile,
    shard_names,
    total_bytes,
    weight_layout,
    write_index,
    write_safetensors,
)
from ..pretrained import ChatGLMPreTrainedModel
from ..streamed import as_bytes
from .names import Heads, native_names, official_name

is_computed = ChatGLMPreTrainedModel.is_computed  # such a weight has no place in GlmForCausalLM


def native_files(layout: dict) -> dict[str, str]:
    """The name of the file that each official file becomes; one with only computed weights becomes no file of its own.

    Args:
        layout: see weight_layout.
    """
    full = [path for path, names in layout.items() if not all(map(is_computed, names))]
    files = shard_names(len(full))
    return dict.fromkeys(layout, files[-1]) | dict(zip(full, files, strict=True))


class NativeView:
    """The weights of an official folder as those of GlmForCausalLM.

    layout: file to write -> name -> (type, shape), as from weight_layout.

    Raises:
        CheckpointError: a weight has no place there, or see weight_layout.
    """

    def __init__(self, folder: str, heads: Heads):
        self.weights, self.heads, self.layout = FolderWeights(folder), heads, {}
        self.source = {}  # name -> official name, place among q, k and v
        layout = weight_layout(folder)
        for path, file in native_files(layout).items():
            self.layout.setdefault(file, {})
            for name in in_order(path, layout[path]):
                dtype, shape = layout[path][name]
                if is_computed(name):
                    continue
                names = native_names(name)
                rows = heads.rows if len(names) > 1 else shape[:1]
                for place, (native, count) in enumerate(zip(names, rows, strict=True)):
                    self.layout[file][native] = dtype, torch.Size((count, *shape[1:]))
                    self.source[native] = name, place

    def __getitem__(self, name: str) -> torch.Tensor:
        official, place = self.source[name]
        weight = self.weights[official]
        return self.heads.split(weight)[place] if len(native_names(official)) > 1 else weight


class OfficialView:
    """The weights of a GlmForCausalLM's folder under their official names. Attributes and errors: see NativeView."""

    def __init__(self, folder: str, heads: Heads, kept: str | None = None):
        """
        Args:
            kept: a folder with weights that are added to the files of their names.
        """
        self.weights, self.heads, self.layout, self.parts = FolderWeights(folder), heads, {}, {}
        self.kept = {}
        layout = weight_layout(folder)
        done = set()
        for file, path in zip(shard_names(len(layout)), layout, strict=True):
            self.layout[file] = {}
            for name in in_order(path, layout[path]):
                official = official_name(name)
                self.parts[official] = native_names(official)
                dtype, shape = layout[path][name]
                if official in done:
                    continue
                done.add(official)
                rows = sum(heads.rows) if len(self.parts[official]) > 1 else shape[0]
                self.layout[file][official] = dtype, torch.Size((rows, *shape[1:]))
            extra = os.path.join(kept, file) if kept else ""
            if os.path.isfile(extra):
                self._add(file, WeightFile(extra))
        full = [names for names in self.layout.values() if names]  # k_proj may have been alone in a file
        self.layout = dict(zip(shard_names(len(full)), full, strict=True))

    def _add(self, file: str, extra: WeightFile) -> None:
        for name in extra.names:
            if not is_computed(name):
                raise CheckpointError(f"{extra.path}: {name} does not belong there")
            self.kept[name] = extra[name]
            self.layout[file][name] = extra[name].dtype, extra[name].shape
        self.layout[file] = dict(sorted(self.layout[file].items()))

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.kept:
            return self.kept[name]
        parts = [self.weights[part] for part in self.parts[name]]
        if len({part.dtype for part in parts}) > 1:
            raise CheckpointError(f"{', '.join(self.parts[name])} are of different types")
        return self.heads.join(parts) if len(parts) > 1 else parts[0]

    def close(self) -> None:
        """See FolderWeights."""
        self.weights.close()

    def items(self):
        """Yield (name, tensor) of all weights."""
        for names in self.layout.values():
            for name in names:
                yield name, self[name]


def in_order(path: str, names) -> list[str]:
    """The names of a file's weights in the order in which they lie there, so that the way back gives the same file."""
    return WeightFile(path).file.offset_keys() if path.endswith(".safetensors") else list(names)


def write_view(folder: str, view: NativeView | OfficialView) -> None:
    """Write the weight files of a view, with one weight in memory at a time."""
    for file, shapes in view.layout.items():
        write_safetensors(os.path.join(folder, file), shapes, lambda name: [view[name]])
    view.weights.close()
    write_index(folder, view.layout, total_bytes(view.layout))


def compare_view(view: NativeView | OfficialView, source: str) -> int:
    """Compare the written weights with those that they were made of, bit for bit.

    Args:
        view: the written folder, seen in the form of the source.

    Returns:
        The number of weights.

    Raises:
        CheckpointError: one differs.
    """
    weights, found = FolderWeights(source), {name for names in view.layout.values() for name in names}
    expected = {name for name in weights.where if not is_computed(name)}
    for name in sorted(expected | {name for name in found if not is_computed(name)}):
        if name not in expected & found or not torch.equal(as_bytes(view[name]), as_bytes(weights[name])):
            raise CheckpointError(f"{name} is not as in {source}; the disk or the memory is at fault")
    return len(expected)
