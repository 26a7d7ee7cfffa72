"""Pipelines of a few cases: losses, weights and files of one process; states; refusals. All: tests/pipelines.py."""

import json
import signal
import time

import pytest
import torch
from jobs import run_jobs
from pipelines import Case, compare, differences, handed_over, job, make_inputs, result, weights_of
from runs import ROOT, Launched, command, make_base, make_rows, read_losses, result_bytes

import predict
import train
from glm_models import MODE
from glm_models.pipeline import cut
from tuning.engine import pipeline
from tuning.engine.ds_config import ds_values, load_ds_config
from tuning.engine.pipeline import cut_model
from tuning.engine.source import Source
from tuning.errors import UserError
from tuning.methods import check_method, parameter_groups
from tuning.plan.pipeline import plan_pipeline
from tuning.run.resume import Run, check_stages

# A case, and (ranks, stages) of its pipeline.
CASES = [
    (Case("glm", "all", False, 4), 2, 2),
    (Case("glm2", "lora", True, 4), 2, 2),
    (Case("glm3", "all", True, 1), 4, 4),
    (Case("glm", "lora", False, 8), 4, 2),
    (Case("glm2", "ptuning", False, 4), 2, 2),
    (Case("glm3", "freeze", False, 4), 2, 2),
    (Case("glm", "freeze", True, 4), 2, 2),  # the embedding is the output layer
]


VALIDATED = Case("glm3", "lora", False, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def losses(folder):
    found = {}
    for ranks in (1, 2, 4):
        jobs = {}
        for case, there, stages in CASES:
            if ranks in (1, there):
                jobs |= job(folder, case, ranks, stages if ranks > 1 else 1)
        if ranks == 1:
            (argv,) = job(folder, VALIDATED, 1, 1).values()
            jobs["validated"] = [*argv, "--eval_ratio", "0.2", "--output_dir", str(folder / "validated")]
        found |= run_jobs(folder, ranks, jobs)
    return found


@pytest.mark.parametrize(("case", "ranks", "stages"), CASES)
def test_a_pipeline_trains_as_one_process(folder, losses, case, ranks, stages):
    loss, weight = differences(folder, losses, case, ranks, stages)
    assert loss < 1e-5
    assert weight < 1e-5


# Beside one another on two ranks, so that processes start once


def make_ds_file(folder, kind: str) -> str:
    content = json.loads((folder / "ds.json").read_text())
    content["bf16"]["enabled"] = kind != "fp32"
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture(scope="module")
def more(folder, losses):
    """Losses of runs in two stages, with validation, and each resumed from the state of its second step."""
    jobs = {}
    prefix = Case("glm2", "ptuning", False, 4)  # the second stage has only what the first one counts for the norm
    for kind, case in (("bf16", Case("glm", "all", True, 4)), ("bf16-prefix", prefix), ("fp32", VALIDATED)):
        flags = ["--ds_file", make_ds_file(folder, kind), "--save_state_steps", "2", "--save_total_limit", "3"]
        flags += ["--eval_ratio", "0.2"]
        (argv,) = job(folder, case, 2, 2).values()
        for suffix in ("whole", "resumed"):
            output = folder / f"{kind}-{suffix}"
            jobs[output.name] = [*argv, *flags, "--output_dir", str(output)]
        jobs[output.name] += ["--resume_from_checkpoint", str(folder / f"{kind}-whole/states/step-00000002")]
    return run_jobs(folder, 2, jobs)


@pytest.mark.parametrize("kind", ["bf16", "bf16-prefix", "fp32"])
def test_a_resumed_pipeline_goes_on_to_the_last_bit(folder, more, kind):
    whole, resumed = folder / f"{kind}-whole", folder / f"{kind}-resumed"
    assert more[resumed.name] == more[whole.name][2:]
    assert compare(result(whole), result(resumed)) == 0
    if kind != "fp32":
        assert {t.dtype for t in weights_of(result(whole)).values()} >= {torch.bfloat16}


def test_a_pipeline_validates_as_one_process(folder, more, losses):
    one, other = (json.loads((folder / name / "validation.jsonl").read_text()) for name in ("validated", "fp32-whole"))
    assert one["step"] == other["step"] == 4
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_predict_loads_the_result_of_a_pipeline(folder, losses, capsys):
    rows = folder / "questions.json"
    rows.write_text(json.dumps({"instruction": "写一句话：", "input": "水泵漏水"}, ensure_ascii=False))
    for case, ranks, stages in CASES[:2]:
        output = folder / f"{case.mode}-answers.jsonl"
        flags = f"--mode {case.mode} --model_path {result(folder / case.name(ranks, stages))} --predict_path {rows}"
        predict.main(f"{flags} --max_src_len 96 --max_new_tokens 4 --output_path {output}".split())
        assert len(output.read_text().splitlines()) == 1


def test_a_stopped_pipeline_saves_a_state_and_goes_on_with_the_same_losses(tmp_path):
    base, rows = make_base("glm2", tmp_path / "base"), make_rows(tmp_path / "rows.json")
    log, seen = tmp_path / "log", {}
    for name in ("whole", "stopped"):
        argv = command("glm2", "lora", 2, False, base, rows, tmp_path / name) + ["--pipeline_stages", "2"]
        argv[argv.index("--save_state_steps") + 1] = "1000"
        run = Launched(argv, 2, tmp_path / f"{name}-losses", log)
        if name == "stopped":
            while run.running() and len(read_losses(tmp_path / f"{name}-losses")) < 3:
                time.sleep(0.01)
            run.kill(signal.SIGTERM)
            assert run.wait() == {0: 75, 1: 75}, log.read_text()[-3000:]
            run = Launched(argv, 2, tmp_path / f"{name}-losses", log)
        assert run.wait() == {0: 0, 1: 0}, log.read_text()[-3000:]
        seen[name] = read_losses(tmp_path / f"{name}-losses")
    assert seen["stopped"] == seen["whole"]
    assert result_bytes(tmp_path / "stopped") == result_bytes(tmp_path / "whole")


# What is refused, and the parts


@pytest.mark.parametrize(
    ("costs", "stages", "ends"),
    [
        ([1, 1, 1, 1], 2, [2, 4]),
        ([9, 1, 1, 1], 2, [1, 4]),
        ([5, 1, 1, 5], 4, [1, 2, 3, 4]),
        ([1, 1, 1, 9], 3, [1, 3, 4]),
    ],
)
def test_the_largest_part_is_as_small_as_possible(costs, stages, ends):
    assert [part.stop for part in cut(costs, stages)] == ends


def test_a_stage_holds_its_own_weights_alone(folder, monkeypatch):
    monkeypatch.setattr(pipeline, "on_rank_0", lambda action: action())
    for mode, numbers, ends in (
        ("glm", range(2), "word_embeddings"),
        ("glm3", range(2, 4), "final_layernorm output_layer"),
    ):
        family, path = MODE[mode], str(folder / mode)
        config = family.config.from_pretrained(path)
        stage = pipeline.load_stage(Source(family.model, path, config, torch.float32, "sdpa"), numbers)
        whole = dict(family.model.from_pretrained(path).named_parameters(remove_duplicate=False))
        for name, parameter in stage.named_parameters(remove_duplicate=False):
            own = any(f"layers.{number}." in name for number in numbers) or name.split(".")[-2] in ends.split()
            assert parameter.is_meta != own, name
            assert not own or torch.equal(parameter, whole[name])


def values(stages: int | None) -> dict:
    args = train.parse_args(
        ["--mode", "glm3", "--model_name_or_path", ".", "--train_path", __file__]
        + (["--pipeline_stages", str(stages)] if stages else [])
    )
    return ds_values(args, 1, 10, 32)


def ds_file(tmp_path, name: str = "ds_zero2_no_offload.json", zero: dict | None = None, **sections) -> str:
    content = json.loads((ROOT / name).read_text()) | sections
    content["zero_optimization"] |= zero or {}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_stage_2_is_used_as_1_and_the_section_is_read(tmp_path):
    config = load_ds_config(ds_file(tmp_path, pipeline={"stages": "auto", "partition": "best"}), values(2))
    assert config["zero_optimization"]["stage"] == 1
    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["pipeline"]["stages"] == 2


@pytest.mark.parametrize(
    ("stages", "file", "message"),
    [
        (2, {"name": "ds_zero3_no_offload.json"}, "zero_optimization.stage 3 is refused with --pipeline_stages"),
        (2, {"zero": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer is refused with --pipeline_stages"),
        (2, {"zero": {"overlap_comm": True}}, "overlap_comm"),
        (2, {"pipeline": {"stages": 4}}, '"pipeline.stages" is 4, the command line makes it 2'),
        (2, {"pipeline": {"seed_layers": True}}, "pipeline.seed_layers true is refused"),
        (
            2,
            {"pipeline": {"activation_checkpoint_interval": 1}},
            "pipeline.activation_checkpoint_interval 1 is refused",
        ),
        (None, {"pipeline": {"stages": 2}}, "without --pipeline_stages"),
    ],
)
def test_the_ds_file_is_refused_by_name(tmp_path, stages, file, message):
    with pytest.raises(UserError) as error:
        load_ds_config(ds_file(tmp_path, **file), values(stages))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--init_lora_weights pissa", "it changes the whole base"),
        ("--eval_ratio 0.1 --eval_generate auto", "stages cannot generate"),
        ("--plan --max_memory 24", "the search is for flags without a pipeline"),
        ("--pipeline_stages 1", "must be at least 2"),
    ],
)
def test_flags_are_refused_by_name(flags, message):
    argv = ["--mode", "glm3", "--model_name_or_path", ".", "--train_path", __file__, "--pipeline_stages", "2"]
    with pytest.raises(UserError) as error:
        train.parse_args([*argv, *flags.split()])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("stages", "flags", "message"),
    [(2, "--train_last_layers 1", "stage 0"), (5, "--train_last_layers 4", "has 4 transformer blocks")],
)
def test_every_stage_has_something_that_trains(folder, stages, flags, message):
    argv = f"--mode glm3 --model_name_or_path {folder}/glm3 --train_path {folder}/rows.json --pipeline_stages {stages}"
    args = train.parse_args(f"{argv} --train_type freeze {flags}".split())
    model = check_method(args)
    with pytest.raises(UserError) as error:
        cut_model(args, model, parameter_groups(model, args), {"fp16": {"enabled": False}})
    assert message in str(error.value)


def test_a_state_of_other_stages_is_refused():
    two, four = (Run({"--pipeline_stages": count}, 4, 1) for count in (2, 4))
    none = Run({}, 4, 2)
    for old, run, message in (
        (two, four, "by a pipeline of 2 stages: start with --pipeline_stages 2"),
        (none, two, "without a pipeline: start without --pipeline_stages"),
        (two, none, "start with --pipeline_stages 2"),
        (two, two._replace(ranks=2), "needs the same number again"),
    ):
        with pytest.raises(UserError) as error:
            check_stages("state", old, run)
        assert message in str(error.value)


def test_a_plan_tells_what_each_stage_needs_and_sends(folder, capsys):
    argv = (
        f"--mode glm --train_type all --model_name_or_path {folder}/glm --train_path {folder}/rows.json --max_len 128"
    )
    argv += " --max_src_len 96 --pipeline_stages 4 --gradient_accumulation_steps 2 --plan --plan_gpus 8"
    train.main(argv.split())
    lines = capsys.readouterr().out.splitlines()
    stages = [line.split() for line in lines if line.split()[:1] in (["0"], ["1"], ["2"], ["3"])]
    assert [line[1] for line in stages] == ["2", "2", "2", "1"]  # micro-batches in flight
    with pytest.raises(UserError, match="5 GPUs cannot share 4 stages"):
        plan_pipeline(train.parse_args([*argv.split(), "--plan_gpus", "5"]), train.plan_setup)


def test_ranks_hand_over_what_is_computed(folder):
    (argv,) = job(folder, CASES[0][0], 2, 2).values()
    for counted, computed in handed_over(folder, [*argv, "--output_dir", str(folder / "counted")], 2):
        assert counted == pytest.approx(computed, rel=0.01)
        assert counted[0] > 0
        assert counted[1] > 0  # the tied embedding
