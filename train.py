"""Fine-tune ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B with DeepSpeed: freeze, P-Tuning v2, LoRA or all parameters.

    deepspeed train.py --mode glm3 --train_type lora --model_name_or_path ChatGLM3-6B/ --train_path data/spo_0.json

`train_step` is one optimizer step, `train` the order of events around it. The flags are in tuning/arguments/train.py,
the methods in tuning/methods.py, the families in glm_models.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import NamedTuple

from tuning.arguments.parser import answer_early
from tuning.arguments.train import parse_args, validates
from tuning.environment import let_segments_grow, use_large_pages

if __name__ == "__main__":
    answer_early(parse_args)

let_segments_grow()
use_large_pages()

import deepspeed
import torch
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER

from data_set import Sources, batch_shape, data_settings, dump, load_sources, name_files, training_steps
from glm_models import MODE
from glm_models.convert.direct import check_convertible
from glm_models.ops import TiledMLP
from glm_models.pipeline import pipeline_input
from glm_models.pretrained import check_not_quantised
from glm_models.quantized import BITS
from tuning import hub
from tuning.engine import patches
from tuning.engine.ds_config import (
    compute_dtype,
    ds_notes,
    fit_buckets,
    fit_schedule,
    load_training_config,
    split_groups,
    zero_layout,
)
from tuning.engine.loading import Quantize, load_base, load_tokenizer
from tuning.engine.pipeline import build_stages, cut_model, describe_stages, divide_ranks, own_groups
from tuning.engine.saving import check_room, count_results, is_save_step, result_size, save
from tuning.exits import exit_on_user_errors
from tuning.lora.adapter import record_base
from tuning.lora.earlier import start_from_adapter
from tuning.lora.prefix import start_from_prefix, take_prefix
from tuning.lora.starts import make_start
from tuning.methods import build_model, check_method, check_zero3, count_parameters, parameter_groups
from tuning.plan import planner
from tuning.plan.pipeline import plan_pipeline
from tuning.plan.planner import memory_advice, plan_setup
from tuning.run.flops import matmul_peak, needed_flops
from tuning.run.health import NO_HOOKS, PeerWatchdog, StepHooks, StepMonitor, explain_oom
from tuning.run.launch import describe_devices, leaving_distributed, start_distributed, telling_others
from tuning.run.log import RunLog, next_steps
from tuning.run.nodes import check_same_run, check_start
from tuning.run.record import (
    RunRecord,
    begin_output,
    check_resume,
    claim_output,
    describe_run,
    describe_start,
    describe_versions,
)
from tuning.run.resume import Checkpoints, ds_section
from tuning.run.validation import Validation
from tuning.samples.batches import Batch
from tuning.samples.check import check_data
from tuning.samples.epochs import RunLength, run_length
from utils import (
    data_parallel_size,
    device,
    is_rank_0,
    on_rank_0,
    once_per_node,
    print_rank_0,
    set_seed,
    silence_libraries,
    wait_for_all,
)


def train_step(engine, batches: list[Batch]) -> list[torch.Tensor]:
    """One optimizer step of this rank. The engine accumulates, scales, clips and counts.

    Args:
        batches: the step's micro-batches, `gradient_accumulation_steps` of them.

    Returns:
        The loss of each, on the device.
    """
    losses = []
    for batch in batches:
        loss = engine(**batch.to(engine.device)).loss
        engine.backward(loss)
        engine.step()  # changes the weights after the last micro-batch only
        losses.append(loss.detach())
    return losses


def pipeline_step(engine, batches: list[Batch]) -> list[torch.Tensor]:
    """One optimizer step of this rank's stage, in place of `train_step` with --pipeline_stages.

    The first stage gives the micro-batches to the engine one after the other, and while one is in a later stage the
    next one begins; each goes forward, then backward. The last stage computes the losses.

    Args:
        batches: the step's micro-batches, the same on all stages.

    Returns:
        The loss of each, on the device; on all stages but the last one zeros.
    """
    engine.train_batch(iter([pipeline_input(batch) for batch in batches]))
    if engine.steps_per_print() is None:  # else the engine prints the times of some steps, and then forgets them
        engine.timers(TRAIN_BATCH_TIMER).reset()
    return engine.fwd_outputs if engine.is_last_stage() else [torch.zeros((), device=engine.device)] * len(batches)


class Data(NamedTuple):
    """What a run learns from, for how many optimizer steps, and how the model is divided."""

    tokenizer: object
    config: object  # of the model
    stages: list[range] | None  # numbers of the blocks of each stage of a pipeline
    sources: Sources
    length: RunLength


class RunParts(NamedTuple):
    """What goes with the engine through a run.

    validation: None without held-out rows.
    save_result: writes the model to a folder of this name in --output_dir.
    """

    log: RunLog
    watch: StepMonitor
    validation: Validation | None
    states: Checkpoints
    record: RunRecord
    save_result: Callable[[str], None]


def run_steps(args, engine, data: Data, parts: RunParts) -> str:
    """The loop over all steps that are left. Returns the name of the last result."""
    log, watch, validation, states, record, save_result = parts
    total_steps, result = data.length.total_steps, ""
    optimizer_step = pipeline_step if args.pipeline_stages else train_step
    for epoch, batches in training_steps(engine, data.sources, args, data.length):
        watch.begin_step(batches)
        losses = optimizer_step(engine, batches)
        log.add(watch.end_step(losses), epoch)  # all ranks stop here if the loss went wrong

        done, result = engine.global_steps, f"epoch-{epoch}-step-{engine.global_steps}"
        saves = is_save_step(args, done, data.length)
        if saves:
            save_result(result)
        if validation and validation.due() and validation.run(epoch):  # early stopping
            if not saves:
                save_result(result)
            record.start["exit"] = "stopped early"
            break
        if done < total_steps and (states.due() or watch.interrupted):
            state = states.save()
            watch.exit_if_interrupted(state)
    return result


def train(args, hooks: StepHooks = NO_HOOKS) -> list[tuple[int, float]]:
    """A whole run. Returns step and loss of every line that was printed."""
    # processes, seed, output folder
    patches.apply()
    start_distributed(args.verbose, args.local_rank)
    divide_ranks(args.pipeline_stages)
    peers = PeerWatchdog()
    check_start(args, describe_versions())
    set_seed(args.seed)
    find_folders(args, hub.WEIGHTS)
    output = claim_output(args)
    state = output.state

    # data, model, engine
    contents = start_from_adapter(args) | start_from_prefix(args)
    data = read_data(args)
    ds_config = load_training_config(args, data.length.total_steps, data.config.hidden_size)
    for line in ds_notes(ds_config):
        print_rank_0(line)
    dtype = compute_dtype(ds_config)
    base = once_per_node(lambda: record_base(args.mode, args.model_name_or_path, dtype, args.quantization_bit))
    run = describe_run(args, contents | data.sources.contents, data.tokenizer, base, ds_config, zero_layout(ds_config))
    check_same_run(args, run.settings, ds_config)
    check_resume(args, state, run, data.length.total_steps)
    engine, model = start_engine(args, ds_config, data.stages, ds_section(state, run.ranks))
    start = make_start(args, model)

    # what goes with the engine
    save_result = functools.partial(save, args, model, data.tokenizer, dtype, base, start)
    log = RunLog(engine, args, data.length, needed_flops(model), matmul_peak(dtype))
    watch = StepMonitor(engine, data.sources.data.files, math.log(data.config.vocab_size), args.skip_nonfinite, hooks)
    resumed = {"log": log, "watch": watch} | ({"start": start} if start else {})
    validation = None
    if validates(args):
        validation = Validation(engine, data.tokenizer, data.sources.held_out, args, data.length, log, save_result)
        resumed["validation"] = validation
    how_many = args.save_state_steps, args.save_total_limit
    states = Checkpoints(engine, model, resumed, run, args.output_dir, *how_many, output.shared)
    size = result_size(model, dtype, args.save_prefix_only)
    on_rank_0(lambda: check_room(args, size, states, count_results(args, data.length)))
    if state:
        states.load(state)
    record = RunRecord(args.output_dir, describe_start(args, run, ds_config, state))

    # training
    print_rank_0(f"training: {data.length.text()} of {ds_config['train_batch_size']} rows")
    on_rank_0(lambda: begin_output(args, state, record))
    patches.keep_freed_memory()
    engine.train()
    log.begin()
    with record.until_the_end(), watch:
        if validation:
            validation.begin()
        result = run_steps(args, engine, data, RunParts(log, watch, validation, states, record, save_result))
    peers.close()
    finish(args, model, result, log, validation)
    del output  # other runs may have the folder now
    return log.history


def find_folders(args, need: str) -> None:
    """Put folders in the place of what the flags name: a hub's model, or a P-Tuning prefix alone, which has a base.

    Args:
        need: see hub.find_model.
    """
    hub.find_models(args, "model_name_or_path", need=need)
    take_prefix(args)


def read_data(args) -> Data:
    """Tokenizer and rows, after the errors in ds file and method: reading rows can take long."""
    tokenizer = load_tokenizer(args.mode, args.model_name_or_path)
    config = MODE[args.mode].config.from_pretrained(args.model_name_or_path)
    check_not_quantised(config)
    if args.save_format == "native":
        check_convertible(args.mode, args.model_name_or_path)
    ds_config = load_training_config(args, 1, config.hidden_size)
    check_zero3(args, ds_config["zero_optimization"]["stage"])
    model = check_method(args)
    if stages := cut_model(args, model, parameter_groups(model, args), ds_config):
        print_rank_0(describe_stages(model, stages, data_parallel_size()))
    print_rank_0(describe_devices(compute_dtype(ds_config)))
    sources = load_sources(args, tokenizer)
    epoch_steps = batch_shape(args).count_steps(len(sources.packs(1)))
    return Data(tokenizer, config, stages, sources, run_length(args.num_train_epochs, args.max_steps, epoch_steps))


def start_engine(args, ds_config: dict, stages: list[range] | None, more: dict):
    """DeepSpeed's engine around the model that the method makes of the base, and that model.

    In a pipeline the model has the weights of this process's stage, and all others without values.

    Args:
        ds_config: gets bucket sizes that fit the model, and then `more`.
    """

    def load(**config):
        dtype, bits, attention = compute_dtype(ds_config), args.quantization_bit, args.attn_implementation
        how = {"quantize": Quantize(bits, device()) if bits else None, "stages": stages}
        return load_base(args.mode, args.model_name_or_path, dtype, ds_config, attention, **how, **config)

    model = build_model(args, load)
    if args.tiled_mlp and ds_config["zero_optimization"]["stage"] == 3:
        deepspeed.utils.set_z3_leaf_modules(model, [TiledMLP])  # see there
    trained, total = count_parameters(model)
    bits = args.quantization_bit
    quantised = f", linear layers of the base in {bits} bits ({BITS[bits]})" if bits else ""
    print_rank_0(
        f"model: {trained:,} of {total:,} parameters train ({trained / total:.2%}), in {compute_dtype(ds_config)}"
        + quantised
    )
    reason = model.transformer.why_one_by_one(device(), compute_dtype(ds_config))
    if reason and device().type != "cpu":
        print_rank_0(f"attention: a call for each sample of a row, not one for all: {reason}")

    fit_buckets(ds_config, trained)
    ds_config |= more
    wait_for_all()  # each has read the base from its own disk
    module = build_stages(model, stages) if stages else model  # first: a tied output layer trains from here on
    groups = split_groups(own_groups(parameter_groups(model, args)), ds_config)
    if args.loraplus_lr_ratio:
        print_rank_0(f"LoRA+: B learns at {args.loraplus_lr_ratio:g} times the rate of A, which is the one in the log")
    fit_schedule(ds_config, groups)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=ds_config)
    patches.drop_copies_of_masters(engine.optimizer)
    engine.lr_scheduler.step(1)  # DeepSpeed's schedulers count from -1: the first two steps would have lr 0
    return engine, model


def finish(args, model, result: str, log: RunLog, validation: Validation | None) -> None:
    """Close the files, and print what to do with the result."""
    if validation:
        validation.close()
    trained, total = count_parameters(model)
    log.close(result=result, trained=trained, parameters=total)
    best = validation.describe_best() if validation else None
    for line in next_steps(args, os.path.join(args.output_dir, result), best):
        print_rank_0(line)


def check(args, tokenizer) -> None:
    """--check_data: needs the tokenizer, and neither other processes nor the model."""
    files = [data_settings(args, path) for path, _ in name_files(args.train_path, weights=True)]
    check_data(files, tokenizer, args.test_path, args.output_dir)


def main(argv=None, hooks: StepHooks = NO_HOOKS) -> None:
    with exit_on_user_errors(), telling_others():
        args = parse_args(argv)
    silence_libraries(args.verbose)
    with exit_on_user_errors(), explain_oom(lambda: memory_advice(args)):
        if args.plan:
            find_folders(args, hub.CONFIG)
            (plan_pipeline if args.pipeline_stages else planner.plan)(args, plan_setup)
        elif args.check_data or args.dump_samples:
            if is_rank_0():
                find_folders(args, hub.TOKENIZER)
                (check if args.check_data else dump)(args, load_tokenizer(args.mode, args.model_name_or_path))
        else:
            with leaving_distributed():
                train(args, hooks)


if __name__ == "__main__":
    main()
