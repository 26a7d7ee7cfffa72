"""Every key that DeepSpeed 0.19 reads from a ds file, and what train.py does with it.

    python -m tuning.engine.ds_keys [planned|said|refused]

prints the table. A key has one of three classes:
  planned  it is obeyed, and --plan counts its effect (most change no memory);
  said     it is obeyed, but --plan does not count it: a line says so when it is set;
  refused  it would change what is trained, what is saved or which rank has which rows, or nothing would read it.
           Values that change nothing are accepted.
Keys of another ZeRO stage are accepted too, and a line says that they do nothing.
"""

import math
import sys
from dataclasses import dataclass

PLANNED, SAID, REFUSED = "planned", "said", "refused"

# Allowed values. A tuple lists all of them.
BOOL, TEXT, TEXTS, ANY = "true or false", "a text", "a list of texts", "anything"
COUNT, POSITIVE, INTEGER = "a whole number, not below 0", "a whole number above 0", "a whole number"
EITHER = "a number, not below 0, or true or false"
NUMBER, SHARE, BETAS = "a number, not below 0", "a number from 0 to 1", "two numbers from 0 to 1, 1 excluded"
LARGEST = 2**53  # above it, floats cannot represent all integers

ALL, EARLY, LATE = (1, 2, 3), (1, 2), (3,)  # ZeRO stages


@dataclass(frozen=True)
class Key:
    """Description of a key.

    kind: PLANNED, SAID or REFUSED.
    takes: allowed values; null is also allowed if it is the default.
    default: DeepSpeed's; ... if there is none.
    stages: ZeRO stages that read it.
    harmless: of a refused key, values that change nothing.
    why: of a refused key, the reason; the end of an error message.
    removed: DeepSpeed refuses a file with this key, whatever its value; a harmless one is deleted.
    """

    kind: str
    takes: str | tuple
    default: object = ...
    stages: tuple[int, ...] = ALL
    harmless: tuple = ()
    why: str = ""
    removed: bool = False


@dataclass(frozen=True)
class Section:
    """Description of a key whose value is an object.

    switch: the key that turns it on; if that is missing or false, no other key matters.
    why: if not empty, the section is refused when it is on, for this reason.
    is_on: whether it is on when the switch is missing.
    stages: ZeRO stages that read it.
    """

    keys: dict
    switch: str = ""
    why: str = ""
    is_on: bool = False
    stages: tuple[int, ...] = ALL


def planned(takes, default=..., stages=ALL) -> Key:
    return Key(PLANNED, takes, default, stages)


def said(takes, default, stages=ALL) -> Key:
    return Key(SAID, takes, default, stages)


def refused(why: str, *harmless) -> Key:
    return Key(REFUSED, ANY, harmless=harmless, why=why)


def each(names: str, known: Key) -> dict[str, Key]:
    """The same description for several keys."""
    return dict.fromkeys(names.split(), known)


def other_mode(why: str, names: str, switch: str = "enabled", is_on: bool = False, **sections) -> Section:
    """A section that is refused when it is on, and whose values are not checked."""
    return Section(each(names, refused(why)) | sections, switch, why, is_on)


def removed(why: str) -> Key:
    """A key that DeepSpeed has removed."""
    return Key(REFUSED, ANY, harmless=(False, None, {}, {"enabled": False}, 0, -1), why=why, removed=True)


CHECKPOINTING = "nothing would read it: --gradient_checkpointing, --offload_inputs and --tiled_mlp save activations"
NVME = "parameters and optimizer on NVMe have never been tried with these scripts; cpu works"
NO_FP16 = "fp16 is too coarse for masters; bf16 has bf16_master_weights_and_grads"
NOBODY = "DeepSpeed 0.19 does not read it"
STATES = "train.py says itself how training states are saved"
QUANTISED = "quantised weights or gradients would change what is trained"
OLD_OFFLOAD = 'write "offload_optimizer" or "offload_param": {"device": "cpu"} instead'
PRESCALE = "ZeRO scales gradients itself"
DATA_ORDER = "curricula, dynamic batches and dropped tokens would change what is learned from which row"
SCALED = "the loss is scaled by train.py for the mean over all rows"

OFFLOAD_OPTIMIZER = {
    "device": planned(("none", "cpu"), "none"),
    "nvme_path": planned(TEXT, None),
    "buffer_count": planned(COUNT, 4),
    "pin_memory": planned(BOOL, True),
    **each("pipeline_read pipeline_write", refused(NVME, False)),
    "fast_init": planned(BOOL, False),
    "ratio": refused("what stays on the GPU follows no lr schedule, and training states leave out its moments", 1.0),
    "super_offload": refused(
        "its optimizer takes back steps, which training states and loss checks do not know", False
    ),
    "cpuadam_cores_perc": planned(SHARE, 0.8),
}
OFFLOAD_PARAM = {
    "device": planned(("none", "cpu"), "none"),
    "nvme_path": planned(TEXT, None),
    "buffer_count": planned(COUNT, 5),
    "buffer_size": planned(COUNT, 10**8),
    "max_in_cpu": planned(COUNT, 10**9),
    "pin_memory": planned(BOOL, True),
}
# Keys of these two sections, and of aio, that do nothing without NVMe or another key.
IDLE = {"nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "fast_init", "cpuadam_cores_perc"}

ZERO = {
    "stage": planned((1, 2, 3)),
    "contiguous_gradients": said(BOOL, True),
    "reduce_scatter": said(BOOL, True),
    "reduce_bucket_size": planned(POSITIVE, 5 * 10**8),
    "use_multi_rank_bucket_allreduce": said(BOOL, True, EARLY),
    "allgather_partitions": refused(NOBODY, True),
    "allgather_bucket_size": planned(POSITIVE, 5 * 10**8, EARLY),
    "overlap_comm": planned(BOOL, None),
    "compute_grad_norm": refused("train.py shows and checks the norm of the gradients", True),
    "load_from_fp32_weights": refused("a resumed run would lose precision", True),
    "elastic_checkpoint": refused(STATES, False),
    "offload_param": Section(OFFLOAD_PARAM, stages=LATE),
    "offload_optimizer": Section(OFFLOAD_OPTIMIZER),
    "zenflow": refused("ZenFlow applies parts of the gradients later: it would train something else", None),
    "sub_group_size": planned(POSITIVE, 10**9, LATE),
    "cpu_offload": refused(OLD_OFFLOAD, False, None),
    "cpu_offload_param": refused(OLD_OFFLOAD, False, None),
    "cpu_offload_use_pin_memory": refused('write "pin_memory" in the offload sections instead', False, None),
    "stage3_prefetch_bucket_size": planned(COUNT, 5 * 10**7, LATE),
    "stage3_param_persistence_threshold": planned(COUNT, 10**5, LATE),
    "stage3_model_persistence_threshold": said(COUNT, sys.maxsize, LATE),
    **each("stage3_max_live_parameters stage3_max_reuse_distance", planned(COUNT, 10**9, LATE)),
    # results are always whole, in the model's type
    **each("stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save", planned(BOOL, False)),
    "stage3_module_granularity_threshold": said(COUNT, 0, LATE),
    **each(
        "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential enable_sanity_checks",
        said(BOOL, False, LATE),
    ),
    "ignore_unused_parameters": planned(BOOL, True, EARLY),
    "legacy_stage1": refused(NOBODY, False),
    **each("round_robin_gradients parameter_alignment", said(BOOL, False, EARLY)),
    "zero_hpz_partition_size": said(POSITIVE, 1, LATE),
    **each(
        "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients", refused(QUANTISED, False)
    ),
    "memory_efficient_linear": planned(BOOL, True, LATE),
    "pipeline_loading_checkpoint": refused("train.py loads the weights itself", False),
    "override_module_apply": refused("weights are loaded without it", True),
    "log_trace_cache_warnings": planned(BOOL, False, LATE),
    "save_muon_momentum_buffer_in_memory": refused("Muon is not among the optimizers", False),
    "leaf_module": Section(each("classes names name_suffixes", said(TEXTS, [], LATE)), stages=LATE),
    **each("mics_shard_size mics_hierarchical_params_gather", removed("DeepSpeed has removed MiCS")),
    "zeropp_loco_param": removed("DeepSpeed has removed LoCo"),
}
# DeepSpeed takes these without "stage3_" too.
for _name in [name for name in ZERO if name.startswith("stage3_") and "fp16" not in name]:
    ZERO[_name.removeprefix("stage3_")] = refused(f'write "{_name}"')

ADAM = {
    **each("lr eps weight_decay", planned(NUMBER)),
    "betas": planned(BETAS),
    "torch_adam": planned(BOOL, False),
    **each("fused foreach", planned(BOOL, None)),
    **each("adam_w_mode bias_correction", planned(BOOL, True)),
    "fp32_optimizer_states": refused('"bf16": {"bf16_optimizer_states": ...} chooses their type', True, None),
    "amsgrad": refused("its third moment is not known to training states and --plan", False),
    "maximize": refused("it would raise the loss", False),
    "capturable": refused("no step runs in a CUDA graph here", False),
    "differentiable": refused("nothing asks for gradients of a step", False),
    "max_grad_norm": refused('write "gradient_clipping"'),
}
# Optimizers that treat each number alone. ZeRO cuts parameters into flat parts: one that looks at rows, columns or
# norms of whole weights (Adafactor, Lamb, Muon, LBFGS) would do something else there.
OPTIMIZERS = ("AdamW", "Adam", "Adagrad", "Lion")
UNTESTED = ("SGD", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta")  # ZeRO wants zero_allow_untested_optimizer
WARMUP = {"warmup_num_steps": planned(POSITIVE), "warmup_type": planned(("linear", "log"))}
WARMUP_LR = {"warmup_min_lr": planned(NUMBER), "warmup_max_lr": planned(NUMBER)} | WARMUP
COSINE = {"warmup_min_ratio": planned(SHARE), "cos_min_ratio": planned(SHARE)} | WARMUP
SCHEDULERS = {
    "WarmupLR": WARMUP_LR,
    "WarmupDecayLR": WARMUP_LR | {"total_num_steps": planned(POSITIVE)},
    "WarmupCosineLR": COSINE | {"total_num_steps": planned(POSITIVE)},
}

MONITOR = {"enabled": planned(BOOL, False), "output_path": planned(TEXT, ""), "job_name": planned(TEXT, "")}

KEYS = {
    **each("train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps", planned(POSITIVE)),
    "gradient_clipping": planned(NUMBER, 1.0),
    "optimizer": Section(
        {"type": planned(TEXT), "params": Section(ADAM), "legacy_fusion": refused("of ZeRO stage 0", False)}
    ),
    "scheduler": Section({"type": planned(TEXT), "params": Section(SCHEDULERS["WarmupDecayLR"] | COSINE)}),
    "bf16": Section(
        {
            "enabled": planned(BOOL, False),
            "immediate_grad_update": said(BOOL, False),
            "check_grad_overflow": refused("gradients that are not finite would reach the weights", True),
            **each("bf16_master_weights_and_grads bf16_optimizer_states", planned(BOOL, False)),
        }
    ),
    "bfloat16": refused('write "bf16"'),
    "fp16": Section(
        {
            "enabled": planned(BOOL, False),
            "auto_cast": refused("inputs are token ids: there is nothing to cast", False),
            "loss_scale": planned(NUMBER, 0),
            "initial_scale_power": planned(tuple(range(65)), 16),
            "loss_scale_window": planned(POSITIVE, 1000),
            "hysteresis": planned(POSITIVE, 2),
            "consecutive_hysteresis": planned(BOOL, False),
            "min_loss_scale": planned(POSITIVE, 1),
            "fp16_master_weights_and_grads": refused(NO_FP16, False),
        }
    ),
    "torch_autocast": other_mode(
        '"bf16" and "fp16" choose the precision', "enabled dtype lower_precision_safe_modules"
    ),
    "data_types": Section(
        {
            "grad_accum_dtype": planned(("fp32", "fp16", "bf16"), None),
            "param_dtype": refused('"bf16" and "fp16" choose the precision', None),
            "buffer_dtype": refused("it would round the rotary positions", None),
            "keep_in_fp32_modules": refused("no buffer of these models needs it", "auto", []),
        }
    ),
    "zero_optimization": Section(ZERO),
    "zero_allow_untested_optimizer": planned(BOOL, False),
    "zero_force_ds_cpu_optimizer": planned(BOOL, True),
    "communication_data_type": said(("fp32", "fp16", "bf16"), None),
    "prescale_gradients": refused(PRESCALE, False),
    "gradient_predivide_factor": refused(PRESCALE, 1.0),
    "gradient_allreduce_op": refused(SCALED, "mean", "MEAN"),
    "managed_gradient_accumulation": refused("every micro-batch would become a step", True),
    "dataloader_drop_last": refused("train.py makes the batches itself; no row is dropped", False),
    "disable_allgather": refused(NOBODY, False),
    "allgather_size": refused('write "zero_optimization": {"allgather_bucket_size": ...}'),
    "vocabulary_size": refused("the checkpoint's config.json has it", None),
    "steps_per_print": planned(POSITIVE, None),
    **each("wall_clock_breakdown memory_breakdown dump_state", planned(BOOL, False)),
    "disable_python_gc": said(BOOL, False),
    "log_level": planned(("debug", "info", "warning", "error", "critical"), None),
    "timers": Section({"throughput": Section({"enabled": planned(BOOL, True), "synchronized": planned(BOOL, True)})}),
    "tensorboard": Section(MONITOR, "enabled"),
    "csv_monitor": Section(MONITOR, "enabled"),
    "wandb": Section({"enabled": planned(BOOL, False)} | each("group team project", planned(TEXT, None)), "enabled"),
    "comet": Section(
        {"enabled": planned(BOOL, False), "samples_log_interval": planned(POSITIVE, 100), "online": planned(BOOL, None)}
        | each("project workspace api_key experiment_name experiment_key mode", planned(TEXT, None)),
        "enabled",
    ),
    "comms_logger": Section(
        each("enabled prof_all verbose debug", planned(BOOL, False)) | {"prof_ops": planned(TEXTS, [])},
        "enabled",
    ),
    "flops_profiler": Section(
        {
            "enabled": said(BOOL, False),
            "recompute_fwd_factor": planned(NUMBER, 0.0),
            "profile_step": planned(COUNT, 1),
            "module_depth": planned(INTEGER, -1),
            "top_modules": planned(POSITIVE, 1),
            "detailed": planned(BOOL, True),
            "output_file": planned(TEXT, None),
        },
        "enabled",
    ),
    "activation_checkpointing": Section(
        {
            **each("partition_activations contiguous_memory_optimization", refused(CHECKPOINTING, False)),
            **each("cpu_checkpointing synchronize_checkpoint_boundary profile", refused(CHECKPOINTING, False)),
            "number_checkpoints": refused(CHECKPOINTING, None),
        }
    ),
    "checkpoint": Section(
        {
            "tag_validation": planned(("Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL", "ignore", "warn", "fail")),
            **each("load_universal use_node_local_storage", refused(STATES, False)),
            "parallel_write": Section({"pipeline_stage": refused(STATES, False)}),
            "checkpoint_serialization": refused(STATES, True),
            "writer": other_mode(
                STATES,
                "type io_buffer_size io_buffer_double io_multiplier show_statistics data_parallel decoupled",
                switch="",
                is_on=True,
            ),
        }
    ),
    "datastates_ckpt": refused(STATES, False),
    "aio": Section(
        {
            **each("block_size queue_depth intra_op_parallelism", planned(POSITIVE)),
            **each("single_submit overlap_events", planned(BOOL)),
            "use_gds": refused(NVME, False),
        }
    ),
    "autotuning": other_mode(
        "it tries settings and trains nothing; --plan --max_memory finds flags that fit",
        "enabled fast results_dir exps_dir overwrite start_profile_step end_profile_step metric metric_path tuner_type "
        "tuner_early_stopping tuner_num_trials arg_mappings model_info model_info_path mp_size max_train_batch_size "
        "min_train_batch_size max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu "
        "num_tuning_micro_batch_sizes",
    ),
    "data_efficiency": other_mode(
        DATA_ORDER,
        "enabled seed",
        data_sampling=other_mode(
            DATA_ORDER,
            "enabled num_epochs num_workers pin_memory",
            curriculum_learning=other_mode(
                DATA_ORDER, "enabled data_cluster_path curriculum_metrics index_to_sample_path index_to_metric_path"
            ),
            dynamic_batching=other_mode(
                DATA_ORDER,
                "enabled metrics_path lr_scaling_method min_batch_size max_batch_size sequence_picking_order "
                "max_tokens verbose",
            ),
        ),
        data_routing=other_mode(
            DATA_ORDER,
            "enabled",
            random_ltd=other_mode(
                DATA_ORDER,
                "enabled model_mask_name model_type micro_batch_size global_batch_size sample_idx attention_mask "
                "hidden_state_order random_ltd_layer_num random_ltd_layer_id total_layer_num random_ltd_schedule "
                "layer_token_lr_schedule",
            ),
        ),
    ),
    "hybrid_engine": other_mode(
        "it is for reinforcement learning",
        "enabled max_out_tokens inference_tp_size release_inference_cache pin_parameters tp_gather_partition_size "
        "enable_cuda_graph",
    ),
    "tensor_parallel": other_mode(
        "these scripts split rows over the devices, not layers",
        "autotp_size dtype tp_overlap_comm vocab_parallel_lm_head vocab_parallel_ce_backend tensor_parallel tp "
        "injection_policy_tuple partition_config preset_model keep_module_on_host replace_with_kernel_inject "
        "kernel_inject",
        switch="autotp_size",
    ),
    "sequence_parallel_size": refused("these scripts split rows over the devices, not tokens", 1),
    "data_parallel_size": refused("all devices have rows of their own"),
    "seq_parallel_communication_data_type": refused("of sequence parallelism", "fp32", None),
    "expert_parallel": other_mode(
        "these models have no experts",
        "enabled autoep_size expert_tensor_parallel_size validate_folding_routing async_split_plan preset_model "
        "moe_layer_pattern expert_pattern router_pattern use_grouped_mm disable_triton_grouped_mm route_norm "
        "route_scale score_apply combine_impl row_weighting_impl gate_up_impl comm_backend comm_num_sm comm_qp_margin "
        "comm_max_tokens_per_rank num_expert_groups num_limited_groups score_func top_k load_balance_coeff "
        "routed_scaling_factor expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr has_shared_experts "
        "shared_experts_pattern shared_experts_gate_pattern expert_activation",
    ),
    "use_data_before_expert_parallelism": refused("these models have no experts", False),
    "pipeline": Section(  # of --pipeline_stages
        {"stages": planned(POSITIVE), "partition": planned(("best", "parameters"), "best")}
        | {"seed_layers": refused("it draws the same random numbers again and again", False)}
        | {"activation_checkpoint_interval": refused("--gradient_checkpointing saves activations", 0)}
        | each("pipe_partitioned grad_partitioned use_reentrant", planned(BOOL, True))  # they do nothing here
    ),
    "compile": other_mode(
        "nothing here compiles the model",
        "deepcompile autoep_non_moe free_activation free_activation_threshold offload_activation "
        "offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log offload_parameters "
        "sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors "
        "keep_all_input_tensors passes",
        switch="deepcompile",
    ),
    "weight_quantization": other_mode(
        QUANTISED, "enabled quantized_initialization post_init_quant num_bits q_type q_groups", is_on=True
    ),
    "nebula": removed("DeepSpeed has removed Nebula"),
    "compression_training": removed("DeepSpeed has removed compression"),
    "amp": removed('DeepSpeed has removed Apex; "bf16" and "fp16" choose the precision'),
    "quantize_training": removed("DeepSpeed has removed quantised training"),
    "sparse_gradients": removed("DeepSpeed has removed sparse gradients"),
    **each("eigenvalue graph_harvesting", removed("DeepSpeed has removed it")),
    "sparse_attention": removed("DeepSpeed has removed sparse attention"),
    "elasticity": removed("DeepSpeed has removed elastic training; states resume with another number of devices"),
    "curriculum_learning": removed("it would change who learns what"),
    "progressive_layer_drop": removed("it would train something else"),
}
COMMENTS = ("_comment", "comment", "//")  # keys that a person may write for other persons


def walk(keys: dict | None = None, prefix: str = ""):
    """Yield (dotted name, Key or Section) of the whole table."""
    for name, known in (KEYS if keys is None else keys).items():
        yield prefix + name, known
        if isinstance(known, Section):
            yield from walk(known.keys, f"{prefix}{name}.")


def is_one(value, choices: tuple) -> bool:
    """Whether a value is among `choices`; true is not 1."""
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)


def fits(value, takes: str | tuple) -> bool:
    """Whether a value is what a key takes."""
    if isinstance(takes, tuple):
        return is_one(value, takes)
    if takes == EITHER:
        return isinstance(value, bool) or fits(value, NUMBER)
    if takes in (TEXT, BOOL):
        return isinstance(value, str if takes == TEXT else bool)
    if takes == TEXTS:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if takes == BETAS:
        return isinstance(value, list) and len(value) == 2 and all(fits(one, SHARE) and one < 1 for one in value)
    if takes == ANY:
        return True
    if type(value) not in (int, float) or not (-LARGEST <= value <= LARGEST or value == sys.maxsize):  # nor NaN
        return False
    if takes in (COUNT, POSITIVE, INTEGER):
        return value == math.floor(value) and value >= {COUNT: 0, POSITIVE: 1, INTEGER: -LARGEST}[takes]
    return 0 <= value <= (1 if takes == SHARE else LARGEST)


def main() -> None:
    wanted = sys.argv[1:] or [PLANNED, SAID, REFUSED]
    for name, known in walk():
        if isinstance(known, Key) and known.kind in wanted:
            stages = "" if known.stages == ALL else f" (ZeRO stage {', '.join(map(str, known.stages))})"
            print(f"{known.kind:8} {name}{stages}{': ' * bool(known.why)}{known.why}")


if __name__ == "__main__":
    main()
