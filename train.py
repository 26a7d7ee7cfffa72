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

from data_set import load_sources, training_steps
from glm_models import MODE
from glm_models.ops import TiledMLP
from tuning.engine import patches
from tuning.engine.ds_config import compute_dtype, ds_notes, ds_values, fit_buckets, load_ds_config, zero_layout
from tuning.engine.loading import load_base, load_tokenizer
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
from tuning.run.health import NO_HOOKS, Peers, StepHooks, Watch, told_clearly
from tuning.run.launch import check_shared, describe_devices, leaving_distributed, start_distributed
from tuning.run.log import RunLog, next_steps
from tuning.run.record import RunRecord, begin_output, check_restart, describe_run, describe_start, open_output
from tuning.run.resume import States, check_run, ds_section
from tuning.run.validation import Validation
from tuning.samples.batches import Batch
from tuning.samples.check import check_data
from tuning.samples.epochs import count_steps
from utils import data_parallel_size, is_main, on_rank_0, quiet, say, set_seed


def check(args) -> None:
    """--check_data: needs the tokenizer, and neither other processes nor the model."""
    tokenizer = load_tokenizer(args.mode, args.model_name_or_path)
    limits = (args.max_len, args.max_src_len, args.is_skip, args.allow_empty_output, args.on_bad_row == "skip")
    check_data(args.train_path, tokenizer, *limits, args.test_path, args.output_dir)


def train_step(engine, batches: list[Batch]) -> list[torch.Tensor]:
    """One optimiser step of this rank. The engine accumulates, scales, clips and counts. Returns each batch's loss."""
    losses = []
    for batch in batches:
        loss = engine(**batch.to(engine.device)).loss
        engine.backward(loss)
        engine.step()  # changes the weights after the last batch only
        losses.append(loss.detach())
    return losses


def train(args, hooks: StepHooks = NO_HOOKS) -> list[tuple[int, float]]:
    """The whole run. Returns (step, loss) of every line it showed."""
    patches.apply()
    start_distributed(args.verbose, args.local_rank)
    peers = Peers()
    set_seed(args.seed)
    locks = []  # held until this function returns
    on_rank_0(lambda: locks.append(lock_folder(args.output_dir)))
    check_shared(args.output_dir)
    state = on_rank_0(lambda: open_output(args))

    tokenizer = load_tokenizer(args.mode, args.model_name_or_path)
    config = MODE[args.mode].config.from_pretrained(args.model_name_or_path)
    # the ds file first without the number of steps, which only the data tells: reading that may take long
    dtype = compute_dtype(load_ds_config(args.ds_file, ds_values(args, data_parallel_size(), 1, config.hidden_size)))
    say(describe_devices(dtype))
    sources = load_sources(args, tokenizer)
    split = (args.per_device_train_batch_size, args.gradient_accumulation_steps, data_parallel_size())
    epoch_steps = count_steps(len(sources.packs(1)), *split)
    total_steps = args.num_train_epochs * epoch_steps

    ds_config = load_ds_config(args.ds_file, ds_values(args, data_parallel_size(), total_steps, config.hidden_size))
    for line in ds_notes(ds_config):
        say(line)
    dtype = compute_dtype(ds_config)
    base = on_rank_0(lambda: record_base(args.mode, args.model_name_or_path, dtype))
    layout = zero_layout(ds_config)
    run = describe_run(args, sources.contents, tokenizer, base, ds_config, layout)
    for change in check_run(state, run, args.resume_changed) if state else ():
        say(f"warning: changed since {state}: {change}")
    if args.resume_from_checkpoint and not state:
        on_rank_0(lambda: check_restart(args.output_dir, results.find_traces(args.output_dir), run))

    def load(**config):
        return load_base(args.mode, args.model_name_or_path, dtype, ds_config, args.attn_implementation, **config)

    model = build_model(args, load)
    if args.tiled_mlp and run.stage == 3:
        deepspeed.utils.set_z3_leaf_modules(model, [TiledMLP])  # see there
    groups = parameter_groups(model, args.weight_decay)
    trained = sum(getattr(p, "ds_numel", p.numel()) for group in groups for p in group["params"])
    every = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    say(f"model: {trained:,} of {every:,} parameters train ({trained / every:.2%}), in {dtype}")

    fit_buckets(ds_config, trained)
    ds_config |= ds_section(state, run.ranks)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=ds_config)
    engine.lr_scheduler.step(1)  # else the first two steps would have lr 0: DeepSpeed's schedulers count from -1
    log = RunLog(
        engine, args.output_dir, args.num_train_epochs, total_steps, args.show_loss_step, needed_flops(model),
        matmul_peak(dtype),
    )  # fmt: skip
    watch = Watch(engine, sources.data.files, math.log(config.vocab_size), args.skip_nonfinite, hooks)
    parts = {"log": log, "watch": watch}

    def keep(name):
        save(args, model, tokenizer, name, dtype, base)

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
    patches.keep_freed_memory()
    engine.train()
    result = f"epoch-{args.num_train_epochs}-step-{total_steps}"
    log.begin()
    with record.until_the_end(), watch:
        if validation:
            validation.begin()
        for epoch, batches in training_steps(engine, sources, args, epoch_steps):
            watch.begin_step(batches)
            losses = train_step(engine, batches)
            log.add(watch.end_step(losses), epoch)
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
                state = states.save()
                watch.exit_if_interrupted(state)
    peers.close()
    if validation:
        validation.close()
    log.close(result=result, trained=trained, parameters=every)
    best = validation.describe_best() if validation else None
    for line in next_steps(args, os.path.join(args.output_dir, result), best):
        say(line)
    return log.history


def main(argv=None, hooks: StepHooks = NO_HOOKS) -> None:
    with clear_errors(DataError):
        args = parse_args(argv)
    quiet(args.verbose)
    with clear_errors(DataError), told_clearly(lambda: memory_advice(args)):
        if args.plan:
            planner.plan(args, plan_setup)
        elif args.check_data:
            if is_main():
                check(args)
        else:
            with leaving_distributed():
                train(args, hooks)


if __name__ == "__main__":
    main()
