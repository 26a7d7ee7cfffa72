"""Fine-tune ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B with DeepSpeed: freeze, P-Tuning v2, LoRA or all parameters.

    deepspeed train.py --mode glm3 --train_type lora --model_name_or_path ChatGLM3-6B/ --train_path data/spo_0.json

`main` is the order of events. `TRAIN_TYPE` has one function a method.
"""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

from allocator import let_segments_grow
from arguments import answer_early
from train_arguments import fixed_flags, parse_args, validates

if __name__ == "__main__":
    answer_early(parse_args)

let_segments_grow()
# Large tensors in large pages: page faults would take 7 % of a CPU's time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, get_peft_model

import data_cache
import data_check
import planner
import results
from adapter import record_base
from data_set import DataError, InstructionData, count_steps, epoch_loader, pack_rows, plan_epoch, prepare
from ds_config import compute_dtype, ds_notes, load_ds_config, zero_layout
from evaluation import Validation, split_rows
from exits import clear_errors
from folders import check_space, free_space, lock_folder, sweep
from glm_models import MODE
from glm_models.ops import TiledMLP
from launch import check_shared, describe_devices, leaving_distributed, start_distributed
from log import RunLog, next_steps
from lora import use_own_layers
from replay import Mixture
from run_record import RunRecord, check_restart, describe_start
from states import LAYOUT, Run, States, check_run, ds_section, find_state
from stops import Peers, Watch, told_clearly
from throughput import matmul_peak, needed_flops
from utils import (
    UserError,
    device,
    is_main,
    keep_freed_memory,
    load_base,
    load_tokenizer,
    on_rank_0,
    once_per_node,
    quiet,
    save_model,
    say,
    set_seed,
    trim_deepspeed,
)

# Methods: each takes the arguments and a function that loads the base model, and returns a model in which exactly the
# parameters to train require gradients.


def freeze(args, load):
    """Train the parameters whose name holds one of --freeze_module_name, freeze the rest (the original's meaning)."""
    model = load()
    wanted = split_names(args.freeze_module_name)
    names = [name for name, _ in model.named_parameters()]
    unknown = [part for part in wanted if not any(part in name for name in names)]
    if unknown:
        raise UserError(
            f"--freeze_module_name {', '.join(unknown)}: no parameter has it in its name. Names look like\n  "
            + "\n  ".join(shorten(names))
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in wanted))
    return model


def ptuning(args, load):
    """Train keys and values that stand before the tokens' own in every layer (P-Tuning v2); freeze the model."""
    prefix = {key: getattr(args, key) for key in ("pre_seq_len", "prefix_projection", "prefix_dropout")}
    model = load(**prefix)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("prefix_encoder." in name)
    return model


def lora(args, load):
    """Train low-rank additions to the weights of the modules named in --lora_module_name (peft); freeze the model."""
    model = load()
    wanted = split_names(args.lora_module_name)
    paths = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    linear = sorted({path.split(".")[-1] for path in paths})
    unknown = [name for name in wanted if name not in linear]
    if unknown:
        in_blocks = ",".join(sorted({path.split(".")[-1] for path in paths if "layers." in path}))
        raise UserError(
            f"--lora_module_name {', '.join(unknown)}: no such linear layer; there are {', '.join(linear)}. "
            f"All linear layers of the blocks: --lora_module_name {in_blocks}"
        )
    config = LoraConfig(
        r=args.lora_dim,
        lora_alpha=args.lora_alpha,
        target_modules=wanted,
        lora_dropout=args.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    use_own_layers(config)
    # in the model's type: DeepSpeed keeps float32 masters, and ZeRO-3 does not cast what differs from it
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def train_all(args, load):
    """Train every parameter."""
    return load().requires_grad_(True)


TRAIN_TYPE = {"freeze": freeze, "ptuning": ptuning, "lora": lora, "all": train_all}


def split_names(text: str) -> list[str]:
    """A comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def shorten(names: list[str]) -> list[str]:
    """Parameter names of the first layer stand for those of all."""
    return [name for name in names if "layers." not in name or "layers.0." in name]


# Training


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """The parameters to train, with weight decay but on biases and norms."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (rest if name.endswith("bias") or "layernorm" in name else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def ds_values(args, world_size: int, total_steps: int, hidden_size: int) -> dict:
    """What "auto" means in a ds file."""
    return {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "train_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size,
        "optimizer.params.lr": args.learning_rate,
        "optimizer.params.weight_decay": args.weight_decay,
        "scheduler.params.warmup_max_lr": args.learning_rate,
        "scheduler.params.warmup_num_steps": max(1, round(total_steps * args.warmup_ratio)),
        # one more than there are: the lr is 0 after the last step, not in it
        "scheduler.params.total_num_steps": total_steps + 1,
        # in numbers, of which a GPU has two buffers; 20 MB are sent well, and alone there is nothing to send
        "zero_optimization.reduce_bucket_size": 10_000_000 if world_size > 1 else 1_000_000,
        "zero_optimization.overlap_comm": world_size > 1,  # alone there is nothing to overlap, and it keeps gradients
        "zero_optimization.allgather_bucket_size": 200_000_000,
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": hidden_size * hidden_size,
    }


def load_data(args, tokenizer, path: str, several_outputs: bool = False) -> InstructionData:
    """A file's samples: prepared by one process a node, or taken from the cache, and then mapped into all of them."""
    settings = (path, tokenizer, args.max_len, args.max_src_len, args.is_skip, args.allow_empty_output)
    keep = args.data_cache != "none"
    cache_dir = (args.data_cache or data_cache.default_folder()) if keep else None
    more = {"skip_bad": args.on_bad_row == "skip", "several_outputs": several_outputs}
    prepared = once_per_node(lambda: prepare(*settings, cache_dir=cache_dir, progress=is_main(), **more))
    data = InstructionData(*settings, prepared=prepared)
    if not keep:
        on_rank_0(lambda: None)  # all have mapped it
        once_per_node(lambda: os.unlink(prepared))  # what is mapped stays readable
    return data


class Sources(NamedTuple):
    """The rows of a run.

    packs: of an epoch, what it takes of `data`: lists of samples' numbers, the same number of lists in each epoch.
    held_out: has the rows to validate on, held_out_rows; none without validation.
    contents: SHA-256 of each file, by the flag that names it.
    """

    data: InstructionData
    packs: Callable[[int], list[list[int]]]
    held_out: InstructionData
    held_out_rows: list[int]
    contents: dict[str, str]


def load_sources(args, tokenizer) -> Sources:
    """All files that flags name."""
    task = held_out = load_data(args, tokenizer, args.train_path)
    say("\n".join((f"data: {task.summary()}", *task.warnings())))
    contents = {"--train_path": task.content}
    rows, held_out_rows = range(len(task)), []
    if args.eval_ratio is not None:
        rows, held_out_rows = split_rows(task, args.eval_ratio)
        say(f"{len(rows)} of them to train on, {len(held_out_rows)} to validate on (--eval_ratio {args.eval_ratio:g})")
    elif args.eval_path:
        held_out = load_data(args, tokenizer, args.eval_path, several_outputs=True)
        held_out_rows, contents["--eval_path"] = list(range(len(held_out))), held_out.content
        say("\n".join((f"validation data: {held_out.summary()}", *held_out.warnings())))
        if held_out.content == task.content:
            say("warning: --eval_path has the very rows of --train_path: its scores say nothing of unseen rows")

    def pack(data, rows):
        return pack_rows(data, args.max_len, args.seed, rows) if args.packing else [[i] for i in rows]

    packs = pack(task, rows)
    if not args.replay_path:
        return Sources(task, lambda epoch: packs, held_out, held_out_rows, contents)
    general = load_data(args, tokenizer, args.replay_path)
    contents["--replay_path"] = general.content
    general_packs = pack(general, range(len(general)))
    longest = args.per_device_train_batch_size
    mixture = Mixture(task, packs, general, general_packs, args.replay_ratio, longest, args.seed)
    say("\n".join((f"replay: {mixture.summary()}", *general.warnings())))
    if general.content == task.content:
        say("warning: --replay_path has the very rows of --train_path")
    return Sources(mixture, mixture.epoch_packs, held_out, held_out_rows, contents)


def check(args) -> None:
    """--check_data: needs the tokenizer, and neither other processes nor the model."""
    tokenizer = load_tokenizer(args.mode, args.model_name_or_path)
    limits = (args.max_len, args.max_src_len, args.is_skip, args.allow_empty_output, args.on_bad_row == "skip")
    data_check.check_data(args.train_path, tokenizer, *limits, args.test_path, args.output_dir)


def build_model(args, load):
    """What the method makes of the base model that `load` gives, with the flags that save memory."""

    def load_lean(**config):
        model = load(**config)
        model.save_memory(args.tiled_mlp, args.offload_inputs)
        return model

    model = TRAIN_TYPE[args.train_type](args, load_lean)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # transformers asks for them, and layers below those that train would pay
    return model


def fit_buckets(ds_config: dict, trained: int) -> None:
    """Make buckets no larger than all gradients together: buffers of their size are allocated."""
    for bucket in ds_config["zero_optimization"].keys() & {"reduce_bucket_size", "allgather_bucket_size"}:
        ds_config["zero_optimization"][bucket] = min(int(ds_config["zero_optimization"][bucket]), trained)


def plan_setup(args, gpus: int) -> planner.Setup:
    """What `train` would start on so many GPUs, with the model on the meta device."""
    family = MODE[args.mode]
    config = family.config.from_pretrained(args.model_name_or_path)
    ds_config = load_ds_config(args.ds_file, ds_values(args, gpus, 1, config.hidden_size), as_gpu=True)
    dtype = compute_dtype(ds_config)

    def load(**changes):
        return family.model(family.config.from_pretrained(args.model_name_or_path, use_cache=False, **changes))

    with torch.device("meta"):
        model = build_model(args, load).to(dtype).train()
    groups = parameter_groups(model, args.weight_decay)
    fit_buckets(ds_config, sum(p.numel() for group in groups for p in group["params"]))
    return planner.Setup(model, planner.longest_batch(args, config), ds_config, groups)


def describe_run(args, contents: dict, tokenizer, base: dict, ds_config: dict, world_size: int) -> Run:
    """What losses depend on: flags, and the content of what flags name; contents are SHA-256 of data, by flag, and base
    is of `adapter.record_base`.
    """
    settings = fixed_flags(args)
    # micro-batches count, whoever has them: so the number of processes may change
    del settings["--gradient_accumulation_steps"]
    settings |= {f"SHA-256 of {flag}": content for flag, content in contents.items()}
    settings |= {
        "--gradient_accumulation_steps x processes": args.gradient_accumulation_steps * world_size,
        "weights of --model_name_or_path": base["fingerprint"],
        "config.json of --model_name_or_path": base["config"],
        "tokenizer of --model_name_or_path": tokenizer.fingerprint(),
    }
    for section in ("optimizer", "scheduler", "bf16", "fp16", "gradient_clipping"):
        settings[f"{section} of --ds_file"] = ds_config.get(section)
    settings[LAYOUT] = zero_layout(ds_config)
    return Run(settings, world_size, ds_config["zero_optimization"]["stage"])


def open_output(args) -> str | None:
    """Make --output_dir ready, on rank 0. Returns the state to go on from, if there is one.

    Raises:
        FolderError, UserError: see `folders.sweep`, `states.find_state` and `results.check_second_run`.
    """
    for folder in (args.output_dir, os.path.join(args.output_dir, "states")):
        for path in sweep(folder):
            say(f"{path}: tidied up after a run that was killed")
    state = None
    if args.resume_from_checkpoint:
        state, broken = find_state(args.resume_from_checkpoint, args.output_dir)
        for problem in broken:
            say(f"warning: a newer state cannot be used: {problem}")
        say(f"going on from {state}" if state else f"no training state in {args.output_dir} yet: from the start")
    results.check_second_run(args.output_dir, state, args.resume_from_checkpoint == "auto", args.overwrite_output_dir)
    return state


def begin_output(args, state: str | None, record: RunRecord) -> None:
    """Give --output_dir to this run, on rank 0: all that can be refused was refused before.

    Raises:
        FolderError: something cannot be removed or written.
    """
    if args.overwrite_output_dir:
        results.remove(results.list_removable(args.output_dir))
    if not state:
        results.remove_events(args.output_dir)
    results.remove_summary(args.output_dir)
    record.write()


def train(args) -> list[tuple[int, float]]:
    """The whole run. Returns (step, loss) of every line it showed."""
    trim_deepspeed()
    _, world_size = start_distributed(args.verbose, args.local_rank)
    peers = Peers()
    set_seed(args.seed)
    locks = []  # held until this function returns
    on_rank_0(lambda: locks.append(lock_folder(args.output_dir)))
    check_shared(args.output_dir)
    state = on_rank_0(lambda: open_output(args))

    tokenizer = load_tokenizer(args.mode, args.model_name_or_path)
    config = MODE[args.mode].config.from_pretrained(args.model_name_or_path)
    # the ds file first without the number of steps, which only the data tells: reading that may take long
    dtype = compute_dtype(load_ds_config(args.ds_file, ds_values(args, world_size, 1, config.hidden_size)))
    say(describe_devices(dtype))
    sources = load_sources(args, tokenizer)
    split = (args.per_device_train_batch_size, args.gradient_accumulation_steps, world_size)
    epoch_steps = count_steps(len(sources.packs(1)), *split)
    total_steps = args.num_train_epochs * epoch_steps

    ds_config = load_ds_config(args.ds_file, ds_values(args, world_size, total_steps, config.hidden_size))
    for line in ds_notes(ds_config):
        say(line)
    dtype = compute_dtype(ds_config)
    base = on_rank_0(lambda: record_base(args.mode, args.model_name_or_path, dtype))
    run = describe_run(args, sources.contents, tokenizer, base, ds_config, world_size)
    for change in check_run(state, run, args.resume_changed) if state else ():
        say(f"warning: changed since {state}: {change}")
    if args.resume_from_checkpoint and not state:
        on_rank_0(lambda: check_restart(args.output_dir, results.find_traces(args.output_dir), run))

    def load(**config):
        return load_base(args.mode, args.model_name_or_path, dtype, ds_config, args.attn_implementation, **config)

    model = build_model(args, load)
    model.base_record = base
    if args.tiled_mlp and model.zero3:
        deepspeed.utils.set_z3_leaf_modules(model, [TiledMLP])  # see there
    groups = parameter_groups(model, args.weight_decay)
    trained = sum(getattr(p, "ds_numel", p.numel()) for group in groups for p in group["params"])
    every = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    say(f"model: {trained:,} of {every:,} parameters train ({trained / every:.2%}), in {dtype}")

    fit_buckets(ds_config, trained)
    ds_config |= ds_section(state, world_size)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=ds_config)
    engine.lr_scheduler.step(1)  # else the first two steps would have lr 0: DeepSpeed's schedulers count from -1
    log = RunLog(
        engine, args.output_dir, args.num_train_epochs, total_steps, args.show_loss_step, needed_flops(model),
        matmul_peak(dtype),
    )  # fmt: skip
    watch = Watch(engine, sources.data.files, math.log(config.vocab_size), args.skip_nonfinite)
    parts = {"log": log, "watch": watch}

    def keep(name):
        save(args, model, tokenizer, name, dtype)

    validation = None
    if validates(args):
        rows = (sources.held_out, sources.held_out_rows, args.eval_path or args.train_path)
        steps = (args.eval_steps or epoch_steps, total_steps)
        validation = parts["validation"] = Validation(engine, tokenizer, *rows, args, *steps, log, lambda: keep("best"))
    states = States(engine, parts, run, args.output_dir, args.save_state_steps, args.save_total_limit)
    on_rank_0(lambda: check_room(args, result_size(model, dtype), states, count_results(args, epoch_steps)))
    if state:
        states.load(state)
    record = RunRecord(args.output_dir, describe_start(args, run, ds_config, state))
    say(f"training: {args.num_train_epochs} epochs, {total_steps} steps of {ds_config['train_batch_size']} rows")

    on_rank_0(lambda: begin_output(args, state, record))
    keep_freed_memory()
    engine.train()
    result = f"epoch-{args.num_train_epochs}-step-{total_steps}"
    log.begin()
    with record.until_the_end(), watch:
        if validation:
            validation.begin()
        for epoch, batch in training_batches(args, engine, sources, split, epoch_steps):
            loss = engine(**watch.begin(batch).to(device())).loss
            engine.backward(loss)
            engine.step()

            step = watch.end(loss)  # None until all micro-batches of an optimiser step are through
            if step is None:
                continue
            log.add(step, epoch)
            done, result = engine.global_steps, f"epoch-{epoch}-step-{engine.global_steps}"
            wanted = done % epoch_steps == 0 or (args.save_model_step and done % args.save_model_step == 0)
            if wanted:
                keep(result)
            if validation and validation.due() and validation.run(epoch):
                if not wanted:
                    keep(result)
                record.start["exit"] = "stopped early"
                break
            if done < total_steps and (states.due() or watch.interrupted):
                watch.end_if_interrupted(states.save())
    peers.close()
    if validation:
        validation.close()
    log.close(result=result, trained=trained, parameters=every)
    best = validation.describe_best() if validation else None
    for line in next_steps(args, os.path.join(args.output_dir, result), best):
        say(line)
    return log.history


def training_batches(args, engine, sources: Sources, split, epoch_steps: int):
    """Yield epoch and batch, each of this rank from where the engine is to the end of the run."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    pin = get_accelerator().device_name() != "cpu"
    for epoch in range(engine.global_steps // epoch_steps + 1, args.num_train_epochs + 1):
        plan = plan_epoch(sources.data, sources.packs(epoch), *split, args.seed, epoch, args.group_by_length)
        todo = plan[engine.global_steps % epoch_steps :]
        for batch in epoch_loader(sources.data, todo, rank, world_size, pin):
            yield epoch, batch


def result_size(model, dtype) -> int:
    """Bytes of the weights of one result."""
    adapter = hasattr(model, "peft_config")
    # a tied output layer is written beside the embedding
    parameters = [p for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad or not adapter]
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters) * dtype.itemsize


def count_results(args, epoch_steps: int) -> int:
    """How many results a run saves, best/ apart: after each epoch, and each --save_model_step."""
    total, every = args.num_train_epochs * epoch_steps, args.save_model_step or epoch_steps
    return len({*range(epoch_steps, total + 1, epoch_steps), *range(every, total + 1, every)})


def check_room(args, result: int, states: States, count: int) -> None:
    """Make sure that the disk has room for one result and the states; say what all results will take.

    Args:
        result: bytes of one.
        count: how many there will be.
    """
    # a new state or result is there before an old one goes
    kept = states.size() * (args.save_total_limit + 1) if args.save_state_steps else 0
    freed = results.size_of(results.list_removable(args.output_dir)) if args.overwrite_output_dir else 0
    what = "a result and the training states" if kept else "a result"
    check_space(args.output_dir, result + kept - freed, what)
    all_of_them = f"results: {count} of {shown_size(result)} each"
    if args.keep_results and args.keep_results < count:
        say(f"{all_of_them}; the newest {args.keep_results} stay (--keep_results)")
        count = args.keep_results + 1
    elif count > 1:
        say(f"{all_of_them}, {shown_size(count * result)} in all; --keep_results N would keep the newest N")
    most = count + 2 * validates(args)  # best/
    if free_space(args.output_dir) + freed < most * result + kept:
        say(f"warning: the disk of {args.output_dir} has no room for all that this run keeps; see --keep_results")


def shown_size(size: int) -> str:
    """Bytes, for a reader."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def save(args, model, tokenizer, name: str, dtype) -> None:
    """Write the model to a folder of that name in --output_dir; results beyond --keep_results go."""
    folder = os.path.join(args.output_dir, name)
    on_rank_0(lambda: check_space(args.output_dir, result_size(model, dtype), folder))
    save_model(model, tokenizer, args.model_name_or_path, folder, dtype)
    say(f"saved {folder}")
    if args.keep_results and name != results.BEST:
        for warning in on_rank_0(lambda: results.prune(args.output_dir, results.step_of(folder), args.keep_results)):
            say(f"warning: {warning}")


def memory_advice(args) -> str:
    """What would need less memory, as --plan has it."""
    try:
        return planner.advice(args, planner.Plans(plan_setup, int(os.environ.get("WORLD_SIZE", 1))))
    except Exception as error:  # the error that this is said of must not be lost
        return f"--plan can tell what would need less memory ({error})"


def main(argv=None) -> None:
    with clear_errors(DataError):
        args = parse_args(argv)
    quiet(args.verbose)
    with clear_errors(DataError), told_clearly(lambda: memory_advice(args)):
        if args.plan:
            trim_deepspeed()
            planner.plan(args, plan_setup)
        elif args.check_data:
            if is_main():
                check(args)
        else:
            with leaving_distributed():
                train(args)


if __name__ == "__main__":
    main()
