"""Adapters of transformers' GlmForCausalLM, which predict.py reads beside a base of that form."""

import contextlib
import tempfile

from glm_models.checkpoint import CheckpointError
from glm_models.convert.adapter import Update, check_fit, converted_config, official_update, write_plain_adapter
from glm_models.convert.direct import open_view
from tuning.lora.adapter import PREFIX, open_adapter, read_adapter, read_config


@contextlib.contextmanager
def in_official_form(mode: str, folder: str, base: str):
    """A folder with an adapter in official form: its own, or for an adapter of a GlmForCausalLM a temporary one.

    Args:
        base: its base, of either form.

    Raises:
        CheckpointError, FolderError: it is an adapter of a GlmForCausalLM and its base is not one, does not fit it, or
            it cannot be converted.
    """
    if not any(name.startswith(PREFIX + "model.") for name in open_adapter(folder).names):
        yield folder
        return
    view = open_view(mode, base)
    if view is None:
        raise CheckpointError(
            f"{folder} is an adapter for a GlmForCausalLM, and its base {base} is an official model; convert it first: "
            f"python -m glm_models.convert --mode {mode} --model_path {folder} --ori_model_dir {base} --output_dir NEW"
        )
    adapter = read_adapter(folder, "can be used on a GlmForCausalLM here")
    if adapter.whole:
        raise CheckpointError(f"{folder} has modules that were trained whole (modules_to_save), which is not read here")
    source = Update(adapter.pairs, adapter.magnitudes)
    made = official_update(source, view.heads)
    shapes = {name: shape for names in view.layout.values() for name, (_, shape) in names.items()}
    check_fit(made, shapes, base)
    with tempfile.TemporaryDirectory() as converted:
        write_plain_adapter(converted, converted_config(read_config(folder), source, made, shapes), made)
        yield converted
