"""Saving results: the whole model, or the adapter alone, from any ZeRO stage."""

import itertools
import os

import deepspeed
import torch

from glm_models.checkpoint import FolderWeights, printable, write_json, write_side_files, write_weights
from glm_models.convert import direct
from glm_models.quantized import QuantizedLinear, count_numbers
from tuning.arguments.train import validates
from tuning.engine.pipeline import find_holders, send_to_rank_0
from tuning.folders import check_space, free_space, new_folder
from tuning.lora.adapter import BASE_FILE, QUANTIZATION, write_adapter
from tuning.lora.prefix import write_prefix
from tuning.lora.starts import Start, saved_sizes
from tuning.run import results
from tuning.run.resume import Checkpoints
from tuning.samples.epochs import RunLength
from utils import is_rank_0, on_rank_0, print_rank_0, wait_for_all


def result_size(model, dtype, prefix_only: bool = False) -> int:
    """Bytes of one result's weights.

    Args:
        prefix_only: --save_prefix_only.
    """
    # a tied output layer is written beside the embedding
    if prefix_only or hasattr(model, "peft_config"):
        trained = [p for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
        return sum(getattr(p, "ds_numel", p.numel()) for p in trained) * saved_sizes(model) * dtype.itemsize
    return count_numbers(model, tied_twice=True) * dtype.itemsize


def count_results(args, length: RunLength) -> int:
    """How many results a run saves, without best/; see is_save_step."""
    epoch, total = length.epoch_steps, length.total_steps
    every = args.save_model_step or epoch
    return len({*range(epoch, total + 1, epoch), *range(every, total + 1, every), total})


def is_save_step(args, step: int, length: RunLength) -> bool:
    """Whether a result is saved after this optimizer step: after each epoch, each --save_model_step and at the end."""
    ends = step == length.total_steps or step % length.epoch_steps == 0
    return ends or bool(args.save_model_step and step % args.save_model_step == 0)


def check_room(args, result: int, states: Checkpoints, count: int) -> None:
    """Make sure that the disk has room for one result and the training states; print how much all results need.

    Args:
        result: bytes of one result.
        count: number of results.

    Raises:
        FolderError: there is no room.
    """
    # a new state or result is complete before an old one is removed
    kept = states.size() * (args.save_total_limit + 1) if args.save_state_steps else 0
    freed = results.size_of(results.list_removable(args.output_dir)) if args.overwrite_output_dir else 0
    what = "a result and the training states" if kept else "a result"
    check_space(args.output_dir, result + kept - freed, what)
    all_of_them = f"results: {count} of {shown_size(result)} each"
    if args.keep_results and args.keep_results < count:
        print_rank_0(f"{all_of_them}; the newest {args.keep_results} are kept (--keep_results)")
        count = args.keep_results + 1
    elif count > 1:
        print_rank_0(f"{all_of_them}, {shown_size(count * result)} in total; --keep_results N would keep the newest N")
    most = count + 2 * validates(args)  # best/
    if free_space(args.output_dir) + freed < most * result + kept:
        print_rank_0(
            f"warning: the disk of {args.output_dir} is too small for all results of this run; see --keep_results"
        )


def shown_size(size: int) -> str:
    """Bytes as text, in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def save(args, model, tokenizer, dtype: torch.dtype, base: dict, start: Start | None, name: str) -> None:
    """Write the model to a folder of that name in --output_dir; results beyond --keep_results are removed."""
    folder = os.path.join(args.output_dir, name)
    on_rank_0(lambda: check_space(args.output_dir, result_size(model, dtype, args.save_prefix_only), folder))
    how = {"prefix_only": args.save_prefix_only, "native": args.save_format == "native"}
    save_model(model, tokenizer, args.model_name_or_path, folder, dtype, base, start, **how)
    print_rank_0(f"saved {folder}")
    if args.keep_results and name != results.BEST:
        for warning in on_rank_0(lambda: results.prune(args.output_dir, results.step_of(folder), args.keep_results)):
            print_rank_0(f"warning: {warning}")


def gathered(named_parameters):
    """Yield (name, whole tensor) one at a time, the values on rank 0 at least. Called on every rank.

    It is gathered if ZeRO-3 has partitioned it, and sent if another stage of a pipeline has it.
    """
    named_parameters = list(named_parameters)
    holders = find_holders([parameter for _, parameter in named_parameters])
    for (name, parameter), holder in zip(named_parameters, holders, strict=True):
        if hasattr(parameter, "ds_id"):
            wait_for_all()  # rank 0 may have just written a file
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.data
        else:
            yield name, send_to_rank_0(parameter.data, holder)


def unquantised(named_tensors, model, base: str):
    """Yield (name, tensor), with a quantised layer's weight as it is in the files of the base."""
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    weights = FolderWeights(base) if names else {}
    for name, tensor in named_tensors:
        yield name, weights[name] if name in names else tensor


def save_model(
    model,
    tokenizer,
    base: str,
    folder: str,
    dtype: torch.dtype,
    record: dict,
    start: Start | None = None,
    prefix_only: bool = False,
    native: bool = False,
) -> None:
    """Write the result: the adapter alone for LoRA, otherwise a complete model folder. Called on every rank.

    All ZeRO stages write the same files. One tensor is gathered at a time, and rank 0 holds one shard.

    Args:
        base: folder of the base model; config, tokenizer and official code are copied from there.
        record: what the folder of an adapter, of a prefix alone, or of a prefix on a quantised base, says of it; see
            adapter.record_base.
        start: see adapter.write_adapter.
        prefix_only: write the P-Tuning prefix alone.
        native: write a complete model as a GlmForCausalLM.
    """
    if prefix_only or hasattr(model, "peft_config"):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in gathered(trained) if is_rank_0()}
        if is_rank_0():
            with new_folder(folder) as partial:
                if prefix_only:
                    write_prefix(partial, model, tensors, base, record, tokenizer.stop_token_ids)
                else:
                    write_adapter(partial, model, tensors, base, record, start)
    else:
        save_full_model(model, tokenizer, base, folder, dtype, record, native)
    wait_for_all()  # NCCL would time out before a large file is on a slow disk


def save_full_model(
    model, tokenizer, base: str, folder: str, dtype: torch.dtype, record: dict, native: bool = False
) -> None:
    """Write a complete model folder; of a quantised base, with its weights before that. Arguments: see save_model."""
    parameters = list(model.named_parameters(remove_duplicate=False))  # a tied output layer too, for other tools
    buffers = model.official_buffers()
    size = result_size(model, dtype)
    total = size + sum(b.numel() * b.element_size() for b in buffers.values())
    whole = unquantised(gathered(parameters), model, base)
    if not is_rank_0():
        for _ in whole:  # takes part in gathering, but copies nothing
            pass
        return

    tensors = ((name, tensor.to("cpu", dtype)) for name, tensor in whole)
    keys = ("pre_seq_len", "prefix_projection") if model.config.pre_seq_len else ()
    prefix = {key: getattr(model.config, key) for key in keys}
    if native:
        with new_folder(folder) as partial:
            lines = direct.write_model(
                partial, base, model.mode, dtype, tokenizer.stop_token_ids, tensors, size, buffers
            )
        print(*map(printable, lines), sep="\n")
        return
    with new_folder(folder) as partial:
        write_weights(partial, itertools.chain(tensors, buffers.items()), total)
        write_side_files(partial, base, model.mode, dtype, tokenizer.stop_token_ids, **prefix)
        if QUANTIZATION in record:
            write_json(os.path.join(partial, BASE_FILE), record)
