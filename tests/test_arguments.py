"""Command lines: what is accepted, what is refused and how, and that flags are read before torch is imported."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import glm_models
import train
from glm_models import MODE
from tuning import methods
from tuning.arguments import compare as compare_arguments
from tuning.arguments import predict as predict_arguments
from tuning.arguments import train as train_arguments
from tuning.arguments.data import DataPath
from tuning.arguments.lora import StartName
from tuning.arguments.models import FolderOrWeights, Model
from tuning.arguments.parser import (
    SWITCH,
    Boolean,
    File,
    Folder,
    GiB,
    Integer,
    Names,
    NewPath,
    Number,
    Parser,
    Text,
    answer_early,
)
from tuning.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train.py", "predict.py", "merge_lora.py", "tuning.evaluate.forgetting", "tuning.evaluate.compare")
SCRIPTS += ("tuning.evaluate.report",)
HEAVY = ("torch", "transformers", "deepspeed", "peft", "sentencepiece")
NEEDED = ["--mode", "glm3", "--model_name_or_path", ".", "--train_path", __file__]
PREDICT = ["--mode", "glm3", "--model_path", "."]


def refused(parse, flags: str, needed: list[str]) -> list[str]:
    """The lines that a command line is answered with."""
    with pytest.raises(UserError) as error:
        parse([*needed, *shlex.split(flags)])
    lines = str(error.value).split("\n")
    assert all(line.startswith("       ") for line in lines[1:])
    return [line.strip() for line in lines]


def train_refuses(flags: str) -> list[str]:
    return refused(train.parse_args, flags, NEEDED)


# What a parser finds


@pytest.fixture
def parser() -> Parser:
    def contradictions(args):
        return ["--few is above --many"] if args.few > args.many else []

    parser = Parser("Does nothing, 100 % of the time.", contradictions, {"speed": "it is always fast"})
    group = parser.group("numbers")
    group.add_argument("--few", type=Integer(), default=1, help="a number")
    group.add_argument("--many", type=Integer(hint="ask a child"), default=10, help="another number")
    group.add_argument("--share", type=Number(least=0, below=1), help="100 % is not below 1")
    group.add_argument("--rates", type=Number(), nargs="+", default=[], default_text="empty", help="a list")
    group = parser.group("others", needs="--on")
    group.add_argument("--name", type=Text(), default="x", may_change=True, help="its name")
    group = parser.group("kind")
    group.add_argument("--on", **SWITCH, may_change=lambda args: args.few > 1, help="switch it on")
    group.add_argument("--kind", choices=("red", "green"), default="red", help="what it is")
    group.add_argument("--deep", type=Integer(), default=3, needs="--kind green or --share", help="how deep")
    group.add_argument("--to", nargs="?", const="home", help="where it goes")
    group.add_argument("--of", nargs="repeat", default=[], default_text="empty", help="what it has")
    return parser


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        ("", {"few": 1, "many": 10, "share": None, "rates": [], "on": False, "kind": "red", "to": None, "of": []}),
        ("--few=2 --many +30", {"few": 2, "many": 30}),
        ("--few 2 --few 3", {"few": 3}),
        ("--on --name y", {"on": True, "name": "y"}),
        ("--on false", {"on": False}),
        ("--to", {"to": "home"}),
        ("--to away", {"to": "away"}),
        ("--to=", {"to": ""}),
        ("--rates 1 -2 -1e-4 .5", {"rates": [1, -2, -1e-4, 0.5]}),
        ("--to -1e-4", {"to": "-1e-4"}),
        ("--of a --of b c", {"of": ["a", "b", "c"]}),
        ("--kind green --deep 4", {"deep": 4}),
        ("--share 0 --deep 4", {"deep": 4, "share": 0}),
        ("--to '--two words'", {"to": "--two words"}),
    ],
)
def test_values_are_read(parser, flags, values):
    args = vars(parser.parse_args(shlex.split(flags)))
    assert {name: args[name] for name in values} == values


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        ("--few 2.0", ["--few 2.0: must be an integer"]),
        ("--few 1e3", ["--few 1e3: must be an integer"]),
        ("--few １２", ["--few １２: must be an integer"]),
        ("--few ''", ["--few : must be an integer"]),
        ("--few 0", ["--few 0: must be at least 1"]),
        ("--few -3", ["--few -3: must be at least 1"]),
        ("--many 0.1", ["--many 0.1: must be an integer; ask a child"]),
        (f"--few {10**10}", [f"--few {10**10}: must be at most {2**31 - 1}"]),
        (f"--few {'9' * 5000}", [f"--few {'9' * 5000}: must be at most {2**31 - 1}"]),
        (f"--few -{'9' * 5000}", [f"--few -{'9' * 5000}: must be at least 1"]),
        ("--share 1", ["--share 1: must be at least 0 and below 1"]),
        ("--share -1e-4", ["--share -1e-4: must be at least 0 and below 1"]),
        ("--share -inf", ["--share -inf: must be a number"]),
        ("--share nan", ["--share nan: must be a number"]),
        ("--share 1e-4x", ["--share 1e-4x: must be a number"]),
        ("--share 1e999", ["--share 1e999: is too large"]),
        ("--share 1_0", ["--share 1_0: must be a number"]),
        ("--rates 1 x", ["--rates x: must be a number"]),
        ("--rates", ["--rates needs a value"]),
        ("--few --on", ["--few needs a value"]),
        ("--few 1 2", ["--few takes one value, not 2 (1 2); quote a value with spaces"]),
        ("--on perhaps", ["--on perhaps: must be True or False"]),
        ("--kind gren", ["--kind gren: choose from red, green; did you mean green?"]),
        ("--kind blue", ["--kind blue: choose from red, green"]),
        ("--name y", ["--name does nothing without --on"]),
        ("--name x", ["--name does nothing without --on"]),
        ("--on False --name y", ["--name does nothing without --on"]),
        ("--on --name ' '", ["--name  : is empty"]),
        ("--deep 3", ["--deep does nothing without --kind green or --share"]),
        ("--kind red --deep 3", ["--deep does nothing without --kind green or --share"]),
        ("--few 11", ["--few is above --many"]),
        ("--few 11 --many x", ["--many x: must be an integer; ask a child"]),
        ("--fe 2", ["--fe is not known; did you mean --few?"]),
        ("--Few 2", ["--Few is not known; did you mean --few?"]),
        ("--speed=3", ["--speed is not known: it is always fast"]),
        ("-x", ["-x is not known; --help lists all flags"]),
        ("--local_rank=0", ["--local_rank is not known: this script is started with python"]),
        ("--num_gpus 2", ["--num_gpus is not known: it is the launcher's and goes before the script"]),
        ("word --few 2", ["word: which flag is this of?"]),
        (
            "--quick 1 2 --few 0 --name y --kind blue",
            ["--quick is not known", "--few 0: must be", "--kind blue: choose", "--name does nothing"],
        ),
    ],
)
def test_all_that_is_wrong_is_said_in_a_line_each(parser, flags, lines):
    found = refused(parser.parse_args, flags, [])
    assert len(found) == len(lines)
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(start.strip())


def test_flags_that_need_none_of_several_values_say_what_is_there():
    parser = Parser("")
    group = parser.group("method")
    group.add_argument("--kind", choices=("red", "green"), default="red", help="")
    group.add_argument("--deep", type=Integer(), default=3, needs="--kind green", help="")
    assert refused(parser.parse_args, "--deep 3", []) == [
        "--deep does nothing without --kind green, and --kind is red here"
    ]


def test_help_has_defaults_needs_and_no_wall_of_usage(parser, capsys):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--few", "wrong", "--help"])
    assert end.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "[more flags] Does nothing, 100 % of the time." in text
    for part in (
        "--few N a number (default: 1)",
        "--share X 100 % is not below 1 (default: none)",
        "--rates X ... a list (default: empty)",
        "others (with --on): --name TEXT its name (default: x)",
        "--on [True|False] switch it on (default: False)",
        "--kind red|green what it is (default: red)",
        "--deep N how deep (with --kind green or --share; default: 3)",
    ):
        assert part in text


def test_fixed_flags_are_those_that_may_not_change(parser):
    names = ["--few", "--many", "--share", "--rates", "--on", "--kind", "--deep", "--to", "--of"]
    assert list(parser.fixed(parser.parse_args([]))) == names
    fixed = parser.fixed(parser.parse_args(["--few", "2"]))
    assert fixed["--few"] == 2 and "--on" not in fixed


@pytest.mark.parametrize(
    ("text", "gib"),
    [("24", 24), ("24GiB", 24), ("24 g", 24), ("23.5", 23.5), ("24GB", 24e9 / 2**30), ("512MiB", 0.5), ("1e1", 10)],
)
def test_memory_may_have_a_unit(text, gib):
    assert GiB()(text) == pytest.approx(gib)


@pytest.mark.parametrize("text", ["", "GB", "24TB", "0", "-3", "nan", "inf", "24GBs", "2 4", "1e300GB", "9" * 400])
def test_memory_that_cannot_be_meant_is_refused(text):
    with pytest.raises(ValueError):
        GiB()(text)


def test_files_that_cannot_be_read_as_one_are_explained(tmp_path):
    (tmp_path / "a.json").write_text("")
    with pytest.raises(ValueError, match="join the files into one first"):
        File()(f"{tmp_path}/a.json,{tmp_path}/b.json")
    with pytest.raises(ValueError, match="is a folder; a file is needed"):
        File()(str(tmp_path))
    assert train_refuses("--model_name_or_path ./THUDM/chatglm3-6b")[0].endswith("no such folder")
    assert train_refuses("--model_name_or_path output/best") == ["--model_name_or_path output/best: no such folder"]


def test_rank_0_alone_answers(capsys, monkeypatch):
    def wrong():
        raise UserError("no")

    def helped():
        return Parser("all ranks").parse_args(["--help"])

    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        if said:
            with pytest.raises(SystemExit) as end:
                answer_early(wrong)
            assert end.value.code == 2
        else:
            answer_early(wrong)  # main says it, if rank 0 does not
        assert capsys.readouterr().err == ("error: no\n" if said else "")
        with pytest.raises(SystemExit) as end:
            answer_early(helped)
        assert end.value.code == 0
        assert ("all ranks" in capsys.readouterr().out) is said


# Every script


IMPORTED = """
import json, runpy, sys
script, sys.argv = sys.argv[1], sys.argv[1:]
try:
    run = runpy.run_path if script.endswith(".py") else runpy.run_module
    run(script, run_name="__main__")
except SystemExit as end:
    print(json.dumps([end.code, [name for name in {heavy} if name in sys.modules]]))
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_answered_before_torch_is_imported(script):
    for flags, code, said in ((["--help"], 0, "(required)"), (["--helpp"], 2, "--helpp is not known")):
        run = subprocess.run(
            [sys.executable, "-c", IMPORTED.replace("{heavy}", str(HEAVY)), script, *flags],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert json.loads(run.stdout.splitlines()[-1]) == [code, []], run.stderr
        assert said in run.stdout + run.stderr
        assert "Traceback" not in run.stderr


def test_families_are_imported_when_they_are_asked_for():
    code = "import sys, glm_models; from glm_models import MODE; assert list(MODE) == ['glm', 'glm2', 'glm3']\n"
    code += "assert 'glm' in MODE and 'glm4' not in MODE and len(MODE) == 3 and 'torch' not in sys.modules\n"
    code += "assert MODE['glm3'].config.__name__ == 'ChatGLM3Config' and 'torch' in sys.modules\n"
    code += "assert 'glm_models.glm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    for mode, family in MODE.items():
        assert family.model.config_class is family.config and family.tokenizer.mode == mode
    with pytest.raises(KeyError):
        MODE["glm4"]
    with pytest.raises(AttributeError):
        glm_models.nothing  # noqa: B018


def test_the_methods_are_those_of_the_registry():
    assert tuple(methods.TRAIN_TYPE) == train_arguments.TRAIN_TYPES


@pytest.mark.parametrize(
    ("parser", "needed"), [(train_arguments.make_parser, NEEDED), (predict_arguments.make_parser, PREDICT)]
)
def test_flags_that_would_do_nothing_are_refused_whatever_their_value(parser, needed):
    """Every flag that needs another one, alone, with its default where it has one; none of the others is refused."""
    flags = parser().flags
    for flag in flags.values():
        if flag.required:
            continue
        value = {Integer: "1", Number: "0.5", Names: "x", train_arguments.Epochs: "2", GiB: "24"}
        value |= {
            File: __file__,
            DataPath: __file__,
            Folder: ".",
            FolderOrWeights: ".",
            Model: ".",
            Text: "x",
            NewPath: "x",
            Boolean: "True",
            StartName: "pissa",
        }
        if flag.name in ("--loraplus_lr_ratio", "--pipeline_stages"):
            value |= {Number: "2", Integer: "2"}
        text = str(flag.default) if flag.default is not None else (*flag.choices, value.get(type(flag.read)))[0]
        words = [*needed, flag.name, text]
        if flag.needs == "--train_type lora":  # the default
            words += ["--train_type", "all"]
        if flag.needs:
            (line,) = refused(parser().parse_args, "", words)
            assert line.startswith(f"{flag.name} does nothing without {flag.needs}")
            for need in flag.needs.split(" or "):
                assert need.split(" ")[0].removeprefix("--") in flags
        else:
            parser().parse_args(words)


def test_flags_of_train_that_depend_on_others():
    for flags, line in (
        ("--freeze_module_name layers.3.", "--freeze_module_name does nothing without --train_type freeze"),
        ("--train_type freeze --lora_dim 8", "--lora_dim does nothing without --train_type lora"),
        ("--train_type all --pre_seq_len 16", "--pre_seq_len does nothing without --train_type ptuning"),
        ("--max_memory 24", "--max_memory does nothing without --plan"),
        ("--plan False --plan_gpus 4", "--plan_gpus does nothing without --plan"),
        ("--offload_inputs False", "--offload_inputs does nothing without --gradient_checkpointing"),
        ("--keep_attention", "--keep_attention does nothing without --gradient_checkpointing"),
        (
            "--gradient_checkpointing --keep_attention --attn_implementation eager",
            "--keep_attention goes with --attn_implementation sdpa, not with eager",
        ),
        ("--resume_changed", "--resume_changed does nothing without --resume_from_checkpoint"),
        ("--eval_ratio 0.1 --eval_generate_rows 5", "--eval_generate_rows does nothing without --eval_generate"),
        ("--plan --check_data", "--plan and --check_data exclude each other"),
        ("--check_data --dump_samples x", "--check_data and --dump_samples exclude each other"),
        ("--prompt_column x", "--prompt_column does nothing without --response_column"),
        ("--packing --group_by_length", "--packing and --group_by_length exclude each other"),
        ("--max_len 100 --max_src_len 100", "--max_src_len 100 must be less than --max_len 100"),
        ("--num_train_epochs 0", "--num_train_epochs 0: must be above 0; predict.py scores"),
        ("--num_train_epochs -0.5", "--num_train_epochs -0.5: must be above 0"),
        ("--num_train_epochs half", "--num_train_epochs half: must be a number"),
        ("--num_train_epochs 1e30", "--num_train_epochs 1e30: must be at most"),
        ("--max_steps 20 --num_train_epochs 1", "--max_steps and --num_train_epochs exclude each other"),
        ("--max_steps 0", "--max_steps 0: must be at least 1"),
        ("--max_steps 0.5", "--max_steps 0.5: must be an integer"),
        ("--lr_scheduler_type polynomial", "--lr_scheduler_type polynomial: choose from linear, cosine, constant"),
        ("--adapter_path nowhere", "--adapter_path nowhere: no such folder"),
        ("--train_type all --adapter_path .", "--adapter_path does nothing without --train_type lora"),
        ("--lora_alpha nan", "--lora_alpha nan: must be a number"),
        ("--weight_decay -0.1", "--weight_decay -0.1: must be at least 0"),
        ("--seed -1", "--seed -1: must be at least 0"),
        ("--output_dir ''", "--output_dir : is empty"),
        ("--lora_module_name ,", "--lora_module_name ,: is empty"),
        ("--lora_module_name all-linear,dense", "--lora_module_name all-linear,dense: all-linear stands alone"),
        ("--modules_to_save query_key_value", "query_key_value cannot be both in --lora_module_name and in"),
        ("--init_lora_weights eva", "--init_lora_weights eva: needs a pass over the data before training"),
        ("--init_lora_weights False", "--init_lora_weights False: starts from another model than the base"),
        ("--init_lora_weights pissa_niter_", "--init_lora_weights pissa_niter_: choose from true, gaussian"),
        ("--init_lora_weights orthogonal --lora_dim 5", "--init_lora_weights orthogonal needs an even rank"),
        ("--init_lora_weights true --adapter_path .", "--init_lora_weights and --adapter_path exclude each other"),
        ("--train_type all --use_dora", "--use_dora does nothing without --train_type lora"),
        ("--train_type freeze --loraplus_lr_ratio 4", "--loraplus_lr_ratio does nothing without --train_type lora"),
        ("--loraplus_lr_ratio 0.5", "--loraplus_lr_ratio 0.5: must be at least 1"),
        ("--neftune_noise_alpha 0", "--neftune_noise_alpha 0: must be above 0"),
        ("--train_last_layers 2", "--train_last_layers does nothing without --train_type freeze"),
        (
            "--train_type freeze --train_last_layers 2 --freeze_module_name layers.3.",
            "--train_last_layers and --freeze_module_name exclude each other",
        ),
    ):
        (found,) = train_refuses(flags)
        assert found.startswith(line)
    for flags in (
        "--train_type freeze --freeze_module_name layers.3.",
        "--eval_ratio 0.1 --eval_generate auto --eval_generate_rows 5",
        "--plan --max_memory 24GB --plan_gpus 4",
        "--resume_from_checkpoint --resume_changed",
        "--save_total_limit 1",  # a signal saves a state too
        f"--check_data --test_path {__file__}",
    ):
        train.parse_args([*NEEDED, *flags.split()])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--top_p 0.8", "--top_p does nothing without --do_sample"),
        ("--predict_path x.py --seed 1", "--seed does nothing without --do_sample"),
        ("--output_path x", "--output_path does nothing without --predict_path"),
        ("--num_beams 2", "--num_beams does nothing without --predict_path or --instruction or --input"),
        ("--predict_path x.py --input x", "--predict_path and --instruction or --input exclude each other"),
        ("--max_length 16 --input x", "--max_src_len 0 must be above 0 and well below --max_length 16"),
        ("--do_sample --top_p 1.1", "--top_p 1.1: must be above 0 and at most 1"),
        ("--checkpoint x", "--checkpoint is not known; did you mean --model_path?"),
        ("--max_new_token 3", "--max_new_token is not known; did you mean --max_new_tokens?"),
    ],
)
def test_flags_of_predict(flags, line):
    flags = flags.replace("x.py", __file__)
    found = refused(predict_arguments.parse_args, flags, PREDICT)
    assert len(found) == 1 and found[0].startswith(line)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("--lora_rank 8", "did you mean --lora_dim?"),
        ("--lora_r=8", "did you mean --lora_dim?"),
        ("--lr 1e-4", "did you mean --learning_rate?"),
        ("--learning-rate 1e-4", "did you mean --learning_rate?"),
        ("--learning_rat 1e-4", "did you mean --learning_rate?"),
        ("--num_train 2", "did you mean --num_train_epochs?"),
        ("--epochs 2", "did you mean --num_train_epochs?"),
        ("--batch_size 2", "did you mean --per_device_train_batch_size?"),
        ("--model_path x", "did you mean --model_name_or_path?"),
        ("--dataset x", "did you mean --train_path?"),
        ("--cutoff_len 2048", "did you mean --max_len?"),
        ("--deepspeed ds.json", "did you mean --ds_file?"),
        ("--deepspeed_config ds.json", "did you mean --ds_file?"),
        ("--bf16", "precision is set in the ds file"),
        ("--fp16 True", "precision is set in the ds file"),
        ("--max_train_steps 9", "did you mean --max_steps?"),
        ("--report_to wandb", "TensorBoard"),
        ("--lr_scheduler cosine", "did you mean --lr_scheduler_type?"),
        ("--load_in_4bit", "--quantization_bit 4 quantises the base model"),
        ("--num_gpus 2", "it is the launcher's and goes before the script"),
        ("--banana 2", "--help lists all flags"),
    ],
)
def test_flags_of_other_programs_get_ours(theirs, said):
    (line,) = train_refuses(theirs)
    assert line.startswith(theirs.replace("=", " ").split()[0] + " is not known") and said in line


def test_names_that_hints_and_suggestions_give_exist():
    flags = {**train_arguments.make_parser().flags, **predict_arguments.make_parser().flags}
    for hint in [*train_arguments.HINTS.values(), *predict_arguments.HINTS.values()]:
        assert set(re.findall(r"--(\w+)", hint)) <= flags.keys()
    assert not (train_arguments.HINTS.keys() & train_arguments.make_parser().flags.keys())


def test_a_run_may_be_resumed_with_other_values_of_what_changes_no_result():
    files = f"--eval_path {__file__} --best_metric"
    by_loss = train_arguments.fixed_flags(train.parse_args([*NEEDED, *files.split(), "loss"]))
    by_answers = train_arguments.fixed_flags(train.parse_args([*NEEDED, *files.split(), "f1"]))
    assert set(by_loss) == {
        *("--mode", "--train_type", "--max_len", "--max_src_len", "--is_skip", "--allow_empty_output", "--on_bad_row"),
        *("--prompt_column", "--response_column", "--history_column", "--train_on"),
        *("--packing", "--group_by_length", "--replay_ratio", "--freeze_module_name", "--pre_seq_len"),
        *("--prefix_projection", "--prefix_dropout", "--lora_dim", "--lora_alpha", "--lora_dropout"),
        *("--train_last_layers", "--use_dora", "--use_rslora", "--init_lora_weights", "--modules_to_save"),
        *("--loraplus_lr_ratio", "--neftune_noise_alpha"),
        *("--lora_module_name", "--num_train_epochs", "--max_steps", "--per_device_train_batch_size"),
        *("--gradient_accumulation_steps", "--learning_rate", "--weight_decay", "--warmup_ratio", "--seed"),
        *("--eval_ratio", "--eval_steps", "--best_metric", "--early_stopping_patience", "--quantization_bit"),
    }
    assert set(by_answers) - set(by_loss) == {"--eval_generate", "--eval_generate_rows", "--eval_max_new_tokens"}


def test_epochs_are_counted_in_full_or_in_part():
    for flags, epochs, steps in (("", 1, None), ("--num_train_epochs 3", 3, None), ("--num_train_epochs 2.0", 2, None)):
        args = train.parse_args([*NEEDED, *flags.split()])
        assert (args.num_train_epochs, type(args.num_train_epochs), args.max_steps) == (epochs, int, steps)
    assert train.parse_args([*NEEDED, "--num_train_epochs", ".42"]).num_train_epochs == 0.42
    args = train.parse_args([*NEEDED, "--max_steps", "3000"])
    assert (args.num_train_epochs, args.max_steps) == (None, 3000)


def test_an_adapter_decides_on_the_flags_of_lora(tmp_path):
    names = ("lora_dim", "lora_alpha", "lora_module_name")
    args = train.parse_args(NEEDED)
    assert [getattr(args, name) for name in names] == [8, 30, "query_key_value"]
    args = train.parse_args([*NEEDED, "--adapter_path", str(tmp_path), "--lora_dim", "4"])
    assert [getattr(args, name) for name in names] == [4, None, None]


# Commands that must stay as they are


def test_all_commands_of_the_original_project_are_accepted(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("data/spo_0.json", *(path.name for path in ROOT.glob("ds_zero*.json"))):
        (tmp_path / name).write_text("")
    for name in ("ChatGLM-6B", "ChatGLM2-6B", "ChatGLM3-6B"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    commands = (Path(__file__).parent / "original_commands.txt").read_text().splitlines()
    assert len(commands) == 21
    for command in commands:
        words = shlex.split(command.split(" train.py ")[1])
        args = vars(train.parse_args(["--local_rank=0", *words]))
        given = {word.removeprefix("--"): value for word, value in zip(words, [*words[1:], "--"], strict=True)}
        for name, value in given.items():
            if name in args and not value.startswith("--"):
                kind = type(args[name])
                read = {bool: lambda text: text == "True", list: lambda text: [text]}.get(kind, kind)
                assert args[name] == read(value)


def test_the_scripts_pass_no_flag_that_does_nothing(tmp_path):
    launcher = tmp_path / "deepspeed"
    launcher.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    launcher.chmod(0o755)
    (tmp_path / "model").mkdir()
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": str(tmp_path / "model")}
    environment |= {"DATA": __file__}

    def passed_on(script: Path, *flags: str):
        run = subprocess.run(["bash", script, *flags], env=environment, capture_output=True, text=True, check=True)
        words = run.stdout.splitlines()
        return train.parse_args(words[words.index("train.py") + 1 :])

    for script in sorted(ROOT.glob("scripts/*/*.sh")):
        args = passed_on(script)
        assert (args.mode, args.train_type, args.num_train_epochs) == (script.parent.name, script.stem, 2)
    assert passed_on(script, "--num_train_epochs", "0.5").num_train_epochs == 0.5
    args = passed_on(script, "--max_steps", "9")
    assert (args.max_steps, args.num_train_epochs) == (9, None)


@pytest.fixture
def comparison(tmp_path) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "num_layers": 4}))
    return ["--model", f"glm3={tmp_path}", "--train_path", __file__, "--test_path", __file__]


def test_a_comparison_may_be_of_some_steps(comparison):
    args = compare_arguments.parse_args([*comparison, "--train_flags", "--max_steps 50"])
    flags = compare_arguments.training_flags(args, comparison[1].removeprefix("glm3="), "all", False)
    assert train.parse_args([*NEEDED, *flags]).max_steps == 50


def test_flags_of_a_comparison_go_to_the_methods_that_have_them(comparison):
    text = "--lora_dim 32 --prefix_dropout 0.2 --eval_steps 7 --warmup_ratio 0.2"
    args = compare_arguments.parse_args([*comparison, "--train_flags", text])
    folder = comparison[1].removeprefix("glm3=")
    for method in compare_arguments.METHODS:
        for evaluates in (True, False):
            flags = compare_arguments.training_flags(args, folder, method, evaluates)
            assert ("--lora_dim 32" in " ".join(flags)) == (method == "lora")
            assert ("--prefix_dropout 0.2" in " ".join(flags)) == method.startswith("ptuning")
            assert ("--eval_steps 7" in " ".join(flags)) == evaluates
            needed = [*NEEDED, *["--eval_path", __file__] * evaluates]
            assert train.parse_args([*needed, *flags]).warmup_ratio == 0.2


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--train_flags", "--lora_rank 8"], "--train_flags: --lora_rank is not known; did you mean --lora_dim?"),
        (["--train_flags", "--max_len 3"], "--train_flags: --max_src_len 256 must be less than --max_len 3"),
        (["--train_flags", "--seed 3"], "--train_flags --seed: the comparison sets it by itself"),
        (["--train_flags", "'"], "--train_flags ': No closing quotation"),
        (["--train_flags", "--adapter_path ."], "--train_flags --adapter_path: all methods start from the base"),
        (["--methods", "all", "--train_flags", "--lora_dim 8"], "--train_flags --lora_dim: none of --methods has it"),
        (["--predict_flags", "--top_p 0.5"], "--predict_flags: --top_p does nothing without --do_sample"),
        (["--methods", "all", "--learning_rates", "lora=1"], "--learning_rates lora: it is not among --methods"),
        (["--sweep_rows", "500"], "--sweep_rows does nothing without --sweep"),
        (["--master_port", "29530"], "--master_port does nothing without --num_gpus"),
        (["--learning_rates", "lora=-1"], "--learning_rates lora=-1: must be above 0"),
    ],
)
def test_flags_of_a_comparison_are_checked_before_it_starts(comparison, flags, line):
    assert refused(compare_arguments.parse_args, "", [*comparison, *flags]) == [line]
