"""The ds file: every key that DeepSpeed reads is known; what is not obeyed is refused by name."""

import json
import re
from pathlib import Path

import ds_keys_losses
import ds_source_keys
import pytest
import torch
from runs import LIMIT, Launched, command, make_base, make_rows

import train
import utils
from tuning.arguments.train import SCHEDULES
from tuning.engine import ds_check, ds_config
from tuning.engine.ds_config import ds_notes, load_ds_config, zero_layout
from tuning.engine.ds_keys import KEYS, REFUSED, SCHEDULERS, Key, Section, walk
from tuning.errors import UserError
from tuning.run import resume

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--mode", "glm3", "--model_name_or_path", ".", "--train_path", __file__]
VALUES = ds_config.ds_values(train.parse_args(FLAGS), 2, 10, 64)


@pytest.fixture
def load(tmp_path):
    """load(changes, stage=2, **kwargs): load_ds_config of the project's file with changes by dotted key; None takes
    one out.
    """

    def load_changed(changes, stage=2, **kwargs):
        ds_keys_losses.write(tmp_path / "ds.json", stage, changes)
        return load_ds_config(str(tmp_path / "ds.json"), VALUES, **kwargs)

    return load_changed


# Keys


def test_every_key_that_deepspeed_reads_is_known():
    assert ds_source_keys.unknown() == []


def test_keys_of_a_new_deepspeed_are_found(monkeypatch):
    monkeypatch.delitem(KEYS, "prescale_gradients")
    monkeypatch.delitem(KEYS["zero_optimization"].keys, "parameter_alignment")
    monkeypatch.delitem(ds_source_keys.MODELS, "compile")
    assert ds_source_keys.unknown() == [
        "zero_optimization.parameter_alignment",
        "prescale_gradients (deepspeed/runtime/config.py)",
        "model deepspeed.compile.config.CompileConfig",
    ]


TABLE = dict(walk())
WHOLE = [name for name, known in TABLE.items() if isinstance(known, Section) and known.why]  # refused as a whole


@pytest.mark.parametrize("section", [name for name in WHOLE if not name.startswith("data_efficiency.")])
def test_sections_of_other_modes_are_refused_by_name_when_they_are_on(load, section):
    known = TABLE[section]
    with pytest.raises(UserError, match=f"ds.json: {section} is refused: {re.escape(known.why)}$"):
        load({f"{section}.{known.switch or 'type'}": 3})
    if known.switch:
        off = {f"{section}.{known.switch}": False}
        with pytest.raises(UserError, match=f"{section}.enabledd. is no key"):
            load(off | {f"{section}.enabledd": True})
        assert section not in load(off | {f"{section}.{[*known.keys][-1]}": 5})


def test_a_section_within_one_that_is_not_switched_off_is_refused(load):
    path = "data_efficiency.data_routing.random_ltd.enabled"
    with pytest.raises(UserError, match="data_efficiency is refused: curricula"):
        load({path: True})
    load({path: True, "data_efficiency.enabled": False})


def test_refused_keys_are_refused_by_name_and_their_harmless_values_are_not(load):
    keys = [name for name, key in TABLE.items() if isinstance(key, Key) and key.kind == REFUSED]
    keys = [name for name in keys if not any(name.startswith(f"{section}.") for section in WHOLE)]
    assert len(keys) > 60
    for dotted in keys:
        with pytest.raises(UserError, match=f"ds.json: {dotted} .* is refused: {re.escape(TABLE[dotted].why)}$"):
            load({dotted: ["x"]})
        for value in TABLE[dotted].harmless:
            if value is not None:
                load({dotted: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"zero_optimization.reduce_bucket_sise": 1},
            'zero_optimization.reduce_bucket_sise" is no key .* reduce_bucket_size',
        ),
        ({"gradient_cliping": 1}, "did you mean gradient_clipping"),
        ({"stage3_prefetch_bucket_size": 1}, "there is zero_optimization.stage3_prefetch_bucket_size"),
        ({"zero_optimization.offload_optimizer.devise": "cpu"}, "did you mean device"),
        ({"hybrid_engine.enabledd": False}, "hybrid_engine.enabledd. is no key .* did you mean enabled"),
        ({"zero_optimization.stage": 0}, "stage 0 is refused"),
        ({"zero_optimization.stage": True}, "stage must be 1 or 2 or 3, not true"),
        ({"zero_optimization.stage": None}, "zero_optimization.stage is missing"),
        ({"zero_optimization.offload_optimizer": [[1]]}, r"offload_optimizer. must be an object, not \[\[1\]\]"),
        ({"zero_optimization.offload_optimizer.device": "nvme"}, 'device must be "none" or "cpu", not "nvme"'),
        ({"gradient_clipping": float("nan")}, "gradient_clipping must be a number, not below 0 or .auto., not NaN"),
        ({"zero_optimization.reduce_bucket_size": 10**400}, "must be a whole number above 0"),
        ({"zero_optimization.reduce_bucket_size": 2.5}, "must be a whole number above 0"),
        ({"steps_per_print": "auto"}, "does not know what .auto. means for .steps_per_print"),
        ({"steps_per_print": 0}, "steps_per_print must be a whole number above 0"),
        ({"fp16.initial_scale_power": 5000}, "must be a whole number from 0 to 64, not 5000"),
        ({"bf16.enabled": "yes"}, "bf16.enabled must be true or false or .auto., not .yes."),
        ({"bf16.enabled": True, "fp16.enabled": True}, "bf16 and fp16 are both enabled"),
        ({"optimizer": None, "scheduler": None}, '"optimizer" is missing.*"scheduler" is missing'),
        ({"zero_optimization": None}, '"zero_optimization" is missing'),
        ({"optimizer.type": "SGD"}, 'SGD needs "zero_allow_untested_optimizer": true'),
        ({"optimizer.type": "AdamW8bit"}, "optimizer.type .AdamW8bit. is none .* did you mean AdamW"),
        ({"optimizer.type": "Lamb"}, "optimizer.type .Lamb. is none that works on the parts"),
        ({"optimizer.type": "Lion"}, "Lion goes with .* alone: without, it is not there for a CPU; AdamW works"),
        ({"optimizer.type": "Adagrad"}, "Adagrad goes with .* alone: without, DeepSpeed mixes up its groups"),
        ({"optimizer.params.torch_adam": False}, "optimizer.params.fused. is no key"),
        ({"optimizer.params.foreach": True}, "optimizer: `fused` and `foreach` cannot be `True` together"),
        ({"optimizer.params.betas": [0.9]}, "betas must be two numbers"),
        ({"scheduler.type": "cosine"}, "scheduler.type .cosine. is none .* did you mean WarmupCosineLR"),
        ({"scheduler.type": "StepLR"}, "there are WarmupLR, WarmupDecayLR, WarmupCosineLR"),
        ({"scheduler.params.warmup_type": "exp"}, 'warmup_type must be "linear" or "log" or "auto", not "exp"'),
        ({"scheduler.params.cos_min_ratio": 0.1}, "scheduler.params.cos_min_ratio. is no key"),
        ({"data_types.grad_accum_dtype": "bf16"}, "bf16 would round gradients, which are fp32"),
        ({"communication_data_type": "fp16", "bf16.enabled": True}, "fp16 would round gradients, which are bf16"),
        ({"csv_monitor.enabled": True, "csv_monitor.output_path": __file__}, "output_path .*py. cannot be written"),
        (
            {"optimizer.params.lr": 0.5},
            '"optimizer.params.lr" is 0.5, the command line makes it 0.0001 .--learning_rate',
        ),
        ({"optimizer.params.weight_decay": 0}, '"optimizer.params.weight_decay" is 0, the command line makes it 0.1'),
        ({"scheduler.params.warmup_max_lr": 1e-3}, '"scheduler.params.warmup_max_lr" is 0.001'),
        (
            {"scheduler.params.warmup_num_steps": 7},
            '"scheduler.params.warmup_num_steps" is 7, the command line makes it 1',
        ),
        (
            {"scheduler.params.total_num_steps": 10},
            '"scheduler.params.total_num_steps" is 10, the command line makes it 11',
        ),
        ({"zero_optimization.zero_hpz_partition_size": 3}, "zero_hpz_partition_size 3 does not divide 2 devices"),
        ({"train_batch_size": 16}, '"train_batch_size" is 16, the command line makes it 2'),
    ],
)
def test_a_ds_file_that_cannot_be_meant_is_refused(load, monkeypatch, changes, message):
    monkeypatch.setattr(ds_check.get_accelerator(), "device_name", lambda *_: "cpu")
    monkeypatch.setattr(ds_config, "supports_fp16", lambda: True)
    with pytest.raises(UserError, match=message) as error:
        load(changes)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1500


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text((ROOT / "ds_zero2_no_offload.json").read_text().replace("{", '{"gradient_clipping": 5,', 1))
    with pytest.raises(UserError, match='"gradient_clipping" occurs twice'):
        load_ds_config(str(path), VALUES)


def test_logs_need_their_packages(load, monkeypatch):
    find = ds_check.importlib.util.find_spec
    monkeypatch.setattr(ds_check.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(UserError, match="wandb is enabled and its package is not installed: pip install wandb"):
        load({"wandb.enabled": True})
    load({"wandb.enabled": False, "wandb.project": "mine"})


# Values


def test_the_projects_files_hold_no_auto_that_train_does_not_know(monkeypatch):
    monkeypatch.setattr(ds_check.CPUAdamBuilder, "simd_width", lambda _: "-D__AVX512__")  # one file needs it
    for file in ROOT.glob("ds_zero*.json"):
        config = load_ds_config(str(file), VALUES)
        assert '"auto"' not in json.dumps(config)
        assert len(ds_notes(config)) == ("bf16_states" in file.name)
        assert config["timers"] == {"throughput": {"enabled": False}}


def test_what_is_missing_is_filled_in_like_auto(tmp_path):
    plain = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupDecayLR"}}
    autos = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    autos |= {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    # those of stage 3 are of no use here, and Transformers' files have them at each stage
    names = ("overlap_comm", "reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
    names += ("stage3_param_persistence_threshold",)
    autos["zero_optimization"] = {"stage": 2} | dict.fromkeys(names, "auto")
    names = ("lr", "betas", "eps", "weight_decay")
    autos["optimizer"] = {"type": "AdamW", "params": dict.fromkeys(names, "auto")}
    names = ("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps")
    autos["scheduler"] = {"type": "WarmupDecayLR", "params": dict.fromkeys(names, "auto")}
    found = []
    for content in (plain, autos):
        (tmp_path / "ds.json").write_text(json.dumps(content))
        found.append(load_ds_config(str(tmp_path / "ds.json"), VALUES))
    assert found[0] == found[1]
    assert found[0]["scheduler"]["params"] == {
        "warmup_min_lr": 0,
        "warmup_type": "linear",
        "warmup_max_lr": 1e-4,
        "warmup_num_steps": 1,
        "total_num_steps": 11,
    }
    assert found[0]["optimizer"]["params"] == {"lr": 1e-4, "weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-8}
    assert found[0]["gradient_clipping"] == 1.0


@pytest.mark.parametrize("kind", [None, "linear", "cosine", "constant"])
def test_the_schedule_is_that_of_the_flag(tmp_path, kind):
    """In the project's files, and in one that names a schedule or has "auto" for the keys of another one."""
    values = ds_config.ds_values(
        train.parse_args([*FLAGS, *(["--lr_scheduler_type", kind] if kind else [])]), 2, 10, 64
    )
    wanted = SCHEDULES[kind or "linear"]
    for name in ("ds_zero2_no_offload.json", "ds_zero3_no_offload.json", "ds_zero3_offload.json"):
        content = json.loads((ROOT / name).read_text())
        for params in (content["scheduler"]["params"], dict.fromkeys(("warmup_max_lr", "total_num_steps"), "auto")):
            content["scheduler"] = {"type": "auto", "params": params}
            (tmp_path / "ds.json").write_text(json.dumps(content))
            section = load_ds_config(str(tmp_path / "ds.json"), values)["scheduler"]
            assert section["type"] == wanted
            assert section["params"].keys() == SCHEDULERS[wanted].keys()
            assert section["params"].get("total_num_steps", 11) == 11 and section["params"]["warmup_num_steps"] == 1
    for named in SCHEDULES.values():
        content["scheduler"] = {"type": named}
        (tmp_path / "ds.json").write_text(json.dumps(content))
        if kind and named != wanted:
            line = (
                f'"scheduler.type" is "{named}", the command line makes it {wanted} (--lr_scheduler_type); use "auto"'
            )
            with pytest.raises(UserError, match=re.escape(line)):
                load_ds_config(str(tmp_path / "ds.json"), values)
        else:
            assert load_ds_config(str(tmp_path / "ds.json"), values)["scheduler"]["type"] == named
    content["scheduler"] = {"type": "auto", "params": {"cos_min_ratio": 0.1}}  # not "auto": it would be ignored
    (tmp_path / "ds.json").write_text(json.dumps(content))
    if kind == "cosine":
        assert load_ds_config(str(tmp_path / "ds.json"), values)["scheduler"]["params"]["cos_min_ratio"] == 0.1
    else:
        with pytest.raises(UserError, match=r"scheduler.params.cos_min_ratio. is no key"):
            load_ds_config(str(tmp_path / "ds.json"), values)


def test_numbers_that_say_what_the_command_line_says_are_fine(load):
    config = load(
        {
            "optimizer.params.lr": 0.0001,
            "scheduler.params.total_num_steps": 11,
            "zero_optimization.reduce_bucket_size": 5e8,
            "train_batch_size": 2,
        }
    )
    assert config["optimizer"]["params"]["lr"] == 1e-4
    assert type(config["zero_optimization"]["reduce_bucket_size"]) is int
    load({"scheduler.params.total_num_steps": 1000}, as_gpu=True)  # --plan knows no steps


def test_gradients_of_half_precision_are_summed_in_float32(load):
    for stage in (1, 2, 3):
        for changes in ({}, {"data_types": None}) if stage < 3 else ({},):
            assert load(changes, stage, as_gpu=True)["data_types"]["grad_accum_dtype"] == "fp32"
    assert load({})["data_types"]["grad_accum_dtype"] is None


def test_what_is_not_planned_or_does_nothing_is_said(load):
    config = load({"zero_optimization.round_robin_gradients": True, "zero_optimization.sub_group_size": 5})
    assert ds_notes(config) == [
        "ds file: zero_optimization.round_robin_gradients true is obeyed; --plan does not count it",
        "ds file: zero_optimization.sub_group_size does nothing at ZeRO stage 2",
    ]
    config = load({"zero_optimization.offload_param.device": "cpu", "wandb.project": "mine", "aio.queue_depth": 8})
    assert ds_notes(config) == [
        "ds file: zero_optimization.offload_param does nothing at ZeRO stage 2",
        'ds file: wandb does nothing without "enabled": true',
        "ds file: aio.queue_depth does nothing: it goes with NVMe or super_offload, which are refused",
    ]


def test_comments_and_what_deepspeed_has_removed_go(load):
    config = load({"_comment": "mine", "zero_optimization.//": "too", "elasticity": {"enabled": False}, "amp": None})
    assert not {"_comment", "elasticity", "amp"} & config.keys() and "//" not in config["zero_optimization"]


# Precision


class Gpu:
    """An accelerator of a name, on which torch says what it says."""

    def __init__(self, fp16: bool):
        self.fp16 = fp16

    def device_name(self, *_):
        return "cuda"

    def is_fp16_supported(self):
        return self.fp16

    def is_bf16_supported(self):  # as torch says it of a T4
        return True


@pytest.mark.parametrize("is_real", [True, False])
def test_bf16_is_chosen_where_it_is_not_emulated(load, monkeypatch, is_real):
    asked = []

    def is_bf16_supported(including_emulation=True):
        asked.append(including_emulation)
        return is_real or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    for module in (utils, ds_check, ds_config):
        monkeypatch.setattr(module, "get_accelerator", lambda: Gpu(fp16=True))
    config = load({})
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (is_real, not is_real)
    assert config["data_types"]["grad_accum_dtype"] == "fp32" and asked == [False]


def test_half_precision_that_this_machine_lacks_is_refused_on_two_ranks(tmp_path):
    ds_keys_losses.write(tmp_path / "half.json", 2, {"fp16.enabled": True})
    argv = command(
        "glm3", "lora", 2, False, make_base("glm3", tmp_path / "base"), make_rows(tmp_path / "rows"), tmp_path
    )
    argv += ["--ds_file", str(tmp_path / "half.json")]

    def without_fp16():
        ds_config.supports_fp16 = lambda: False

    run = Launched(argv, 2, tmp_path / "losses", tmp_path / "log", prepare=without_fp16)
    assert run.wait()[0] == 2
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if line.startswith("error")] == [
        f'error: {tmp_path}/half.json: fp16 is enabled, but this CPU cannot do it; set it to "auto" or false'
    ]


# Training states


@pytest.mark.parametrize(
    ("before", "now", "ranks", "message"),
    [
        ({}, {"round_robin_gradients": True}, 2, "saved with round_robin_gradients False in the ds file"),
        ({"sub_group_size": 10}, {"sub_group_size": 20}, 2, "saved with sub_group_size 10 in the ds file"),
        (
            {"round_robin_gradients": True},
            {"round_robin_gradients": True},
            1,
            "round_robin_gradients needs the same number",
        ),
        ({"type": "SGD"}, {"type": "SGD"}, 1, "saved by 2 processes; SGD needs the same number again"),
        ({"round_robin_gradients": True}, {"round_robin_gradients": True}, 2, None),
        ({"type": "Lion"}, {"type": "Lion"}, 1, None),
        ({}, {"reduce_bucket_size": 7}, 1, None),
        ({}, {"offload_optimizer": {"device": "cpu"}}, 2, "saved with optimizer AdamW in the ds file"),
        ({}, {"offload_optimizer": {"device": "cpu"}}, 1, None),
    ],
)
def test_a_state_goes_on_in_its_own_layout_alone(load, monkeypatch, before, now, ranks, message):
    def run(changes, ranks):
        stage = 3 if "sub_group_size" in changes else 2
        more = {f"zero_optimization.{k}": v for k, v in changes.items() if k != "type"}
        if "offload_optimizer" in changes:
            more["optimizer.params"] = {}
        if kind := changes.get("type"):
            more |= {"optimizer.type": kind, "zero_allow_untested_optimizer": True, "optimizer.params": {}}
        config = load(more, stage, as_gpu=True)
        settings = {"optimizer of --ds_file": {"type": config["optimizer"]["type"]}, resume.LAYOUT: zero_layout(config)}
        return resume.Run(settings, ranks, stage)

    monkeypatch.setattr(resume, "read_run", lambda _: run(before, 2))
    if message is None:
        assert resume.check_run("state", run(now, ranks), allow_changes=False) == []
    else:
        with pytest.raises(UserError, match=message):
            resume.check_run("state", run(now, ranks), allow_changes=True)


# Losses


def test_every_obeyed_key_has_a_run_of_its_own():
    assert len(ds_keys_losses.cases()) > 100  # or a reason; made without an error
    assert ds_keys_losses.MAY_DIFFER.keys() <= {name for name, _ in walk()}


SAMPLE = ["round_robin", "module_granularity"]


def test_keys_that_change_no_result_change_no_loss_on_two_ranks(tmp_path):
    wanted = ds_keys_losses.cases(SAMPLE)
    assert len(wanted) == 3
    half = "bf16 with float32 sums, stage 3 against 2"
    wanted[half] = ds_keys_losses.optimizers()[half]
    for name, difference in ds_keys_losses.losses(wanted, tmp_path, limit=LIMIT).items():
        assert not isinstance(difference, str) and difference <= ds_keys_losses.BOUND, (name, difference)
