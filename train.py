"""Fine-tune ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B with DeepSpeed: freeze, P-Tuning v2, LoRA or all parameters.

    deepspeed train.py --mode glm3 --train_type lora --model_name_or_path ChatGLM3-6B/ --train_path data/spo_0.json

`main` is the order of events. `TRAIN_TYPE` has one function a method.
"""

import math
import os

from tuning.arguments.parser import answer_early
from tuning.arguments.train import parse_args, validates
from tuning.environment import let_segments_grow, use_large_pages

if __name__ == "__main__":
    answer_early(parse_args)

let_segments_grow()
use_large_pages()

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from data_set import Sources, data_settings, epoch_loader, load_sources
from glm_models import MODE
from glm_models.ops import TiledMLP
from tuning.engine.ds_config import compute_dtype, ds_notes, ds_values, fit_buckets, load_ds_config, zero_layout
from tuning.engine.loading import load_base, load_tokenizer
from tuning.engine.patches import keep_freed_memory, trim_deepspeed
from tuning.engine.saving import check_room, count_results, result_size, save
from tuning.errors import DataError
from tuning.exits import clear_errors
from tuning.folders import lock_folder
from tuning.lora.adapter import record_base
from tuning.methods import build_model, parameter_groups
from tuning.plan import planner
from tuning.plan.planner import memory_advice, plan_setup
from tuning.run import results
from tuning.run.flops import matmul_peak, needed_flops
from tuning.run.health import Peers, Watch, told_clearly
from tuning.run.launch import check_shared, describe_devices, leaving_distributed, start_distributed
from tuning.run.log import RunLog, next_steps
from tuning.run.record import RunRecord, begin_output, check_restart, describe_run, describe_start, open_output
from tuning.run.resume import States, check_run, ds_section
from tuning.run.validation import Validation
from tuning.samples.check import check_data
from tuning.samples.epochs import BatchShape, plan_epoch
from utils import device, is_main, on_rank_0, quiet, say, set_seed


def check(args) -> None:
    """--check_data: needs the tokenizer, and neither other processes nor the model."""
    tokenizer = load_tokenizer(args.mode, args.model_name_or_path)
    check_data(data_settings(args, args.train_path), tokenizer, args.test_path, args.output_dir)


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
    shape = BatchShape(args.per_device_train_batch_size, args.gradient_accumulation_steps, world_size)
    epoch_steps = shape.count_steps(len(sources.packs(1)))
    total_steps = args.num_train_epochs * epoch_steps

    ds_config = load_ds_config(args.ds_file, ds_values(args, world_size, total_steps, config.hidden_size))
    for line in ds_notes(ds_config):
        say(line)
    dtype = compute_dtype(ds_config)
    base = on_rank_0(lambda: record_base(args.mode, args.model_name_or_path, dtype))
    layout = zero_layout(ds_config)
    run = describe_run(args, sources.contents, tokenizer, base, ds_config, layout, world_size)
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
        steps = (args.eval_steps or epoch_steps, total_steps)
        validation = parts["validation"] = Validation(
            engine, tokenizer, sources.held_out, args, *steps, log, lambda: keep("best")
        )
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
        for epoch, batch in training_batches(args, engine, sources, shape, epoch_steps):
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


def training_batches(args, engine, sources: Sources, shape: BatchShape, epoch_steps: int):
    """Yield epoch and batch, each of this rank from where the engine is to the end of the run."""
    rank = torch.distributed.get_rank()
    pin = get_accelerator().device_name() != "cpu"
    for epoch in range(engine.global_steps // epoch_steps + 1, args.num_train_epochs + 1):
        plan = plan_epoch(sources.data, sources.packs(epoch), shape, args.seed, epoch, args.group_by_length)
        for batch in epoch_loader(sources.data, plan, rank, engine.global_steps % epoch_steps, pin):
            yield epoch, batch


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
