"""Validation while training: its loss is that of a plain recomputation, training does not notice it, and the best model
is the same after kills.
"""

import json
import os
import shutil
import signal
import types
from pathlib import Path

import pytest
import torch
from conftest import TEXT
from runs import BEFORE_STEP, STAGES, Launched, command, make_base, make_rows, read_losses, result_bytes
from test_stops import before_step, errors

import train
from glm_models import MODE, ops
from glm_models.generation import generate_answers
from tuning import folders
from tuning.errors import DataError, UserError
from tuning.run import validation as evaluation
from tuning.run.log import JsonLines
from tuning.run.validation import deal_batches, spread
from tuning.samples.dataset import DataSettings, InstructionData, split_rows

MAX_LEN, MAX_SRC_LEN = 160, 96  # of runs.command


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def bases(work):
    return {mode: make_base(mode, work / mode) for mode in MODE}


@pytest.fixture(scope="module")
def rows(work):
    return make_rows(work / "rows.json", 32)


@pytest.fixture(scope="module")
def held_out(work):
    """Eleven rows of very different lengths; some have several references."""
    path = work / "held-out.json"
    lines = []
    for i in range(11):
        outputs = "".join(TEXT[50 : 51 + i % 4])
        lines.append({"instruction": "接着写：", "input": TEXT[60 + i], "output": [outputs, "x"] if i % 3 else outputs})
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    return path


def start(folder: Path, argv: list[str], ranks: int = 1, prepare=lambda: None) -> tuple[dict, str]:
    """Exit codes by rank, and all that was printed."""
    folder.mkdir(exist_ok=True)
    (folder / "log").unlink(missing_ok=True)
    codes = Launched(argv, ranks, folder / "losses", folder / "log", prepare).wait()
    return codes, (folder / "log").read_text()


def measured(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Loss


def plain_loss(mode: str, folder: Path, path: Path) -> float:
    """One sample at a time, in float64: the mean of -log p of each answer token, all logits at once."""
    tokenizer = MODE[mode].tokenizer.from_pretrained(folder)
    model = MODE[mode].model.from_pretrained(folder, dtype=torch.float64).eval()
    data = InstructionData(DataSettings(str(path), MAX_LEN, MAX_SRC_LEN, several_outputs=True), tokenizer)
    total, tokens = 0.0, 0
    for i in range(len(data)):
        sample = data.samples[i]
        with torch.no_grad():
            logits = model(torch.tensor([sample.input_ids])).logits[0]
        for position in range(len(sample.prompt), len(sample.input_ids)):
            total -= logits[position - 1].log_softmax(-1)[sample.input_ids[position]].item()
            tokens += 1
    return total / tokens


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", MODE)
def test_the_loss_is_that_of_a_plain_recomputation(tmp_path, bases, rows, held_out, mode, ranks, stage):
    argv = command(mode, "all", stage, False, bases[mode], rows, tmp_path / "output")
    flags = f"--eval_path {held_out} --eval_steps 1000 --eval_at_start --num_train_epochs 1".split()
    sizes = (1, 5)

    def prepare():  # measured once more with the other size: to start a run takes most of the time
        real = evaluation.mean_loss

        def twice(model, data, some, size):
            one, five = (real(model, data, some, size) for size in sizes)
            if os.environ["RANK"] == "0":
                with open(tmp_path / "sizes", "a") as file:
                    file.write(json.dumps([one, five]) + "\n")
            return five

        evaluation.mean_loss = twice

    codes, text = start(tmp_path, [*argv, *flags], ranks, prepare)
    assert set(codes.values()) == {0}, text
    first, last = map(json.loads, (tmp_path / "sizes").read_text().splitlines())
    (result,) = (tmp_path / "output").glob("epoch-1-*")
    for seen, folder in ((first, bases[mode]), (last, result)):
        expected = plain_loss(mode, folder, held_out)
        assert max(abs(value - expected) for value in seen) < 1e-6, (seen, expected)
    assert abs(first[1] - last[1]) > 1e-2
    start_line, end_line = measured(tmp_path / "output" / "validation.jsonl")
    assert (start_line["step"], start_line["loss"], end_line["loss"]) == (0, first[1], last[1])


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    layer = ops.OutputLayer(8, 20, bias=False)
    hidden, targets = torch.randn(5, 8), torch.arange(5)
    learnt = layer(hidden, targets)
    made = []
    real = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *args, **kwargs: made.append(args) or real(*args, **kwargs))
    with torch.no_grad():
        assert layer(hidden, targets) == learnt
    assert not made
    layer(hidden, targets)
    assert made  # of the weight's gradient: the test would see it


def test_ranks_have_as_many_batches_and_all_rows_are_there_once():
    lengths = [7, 3, 9, 1, 5, 4, 8, 2, 6]
    for ranks in (1, 2, 3, 7):
        for size in (1, 2, 4, 100):
            dealt = [deal_batches(list(range(9)), lengths, size, rank, ranks) for rank in range(ranks)]
            assert len({len(batches) for batches in dealt}) == 1
            seen = [i for batches in dealt for batch in batches if not batch.is_filler for i in batch.rows]
            assert sorted(seen) == list(range(9))
            assert all(len(batch.rows) <= size for batches in dealt for batch in batches)
    assert spread(list(range(100)), 4) == [0, 25, 50, 75] and spread([1, 2], 5) == [1, 2]


# Training does not notice


@pytest.mark.parametrize(
    ("mode", "method", "ranks", "stage"),
    [("glm", "ptuning", 1, 2), ("glm2", "lora", 2, 3), ("glm3", "all", 2, 3), ("glm3", "lora", 1, 3)],
)
def test_losses_are_those_of_a_run_without_validation(tmp_path, bases, rows, held_out, mode, method, ranks, stage):
    def argv(name):
        more = ["--num_train_epochs", "1", "--show_loss_step", "2"]  # with the default dropout
        return [*command(mode, method, stage, False, bases[mode], rows, tmp_path / name), *more]

    flags = f"--eval_path {held_out} --eval_steps 3 --eval_generate text --eval_max_new_tokens 6 --eval_batch_size 4"
    codes, text = start(tmp_path / "without", argv("plain"), ranks)
    assert set(codes.values()) == {0}, text
    codes, text = start(tmp_path / "with", [*argv("validated"), *flags.split()], ranks)
    assert set(codes.values()) == {0}, text
    expected = read_losses(tmp_path / "without" / "losses")
    assert len(expected) == 8 // ranks and read_losses(tmp_path / "with" / "losses") == expected
    assert result_bytes(tmp_path / "validated") == result_bytes(tmp_path / "plain")

    output = tmp_path / "validated"
    steps = [line["step"] for line in measured(output / "validation.jsonl")]
    assert steps == ([3, 6, 8] if ranks == 1 else [3, 4])
    assert "ended" in measured(output / "validation.jsonl")[0]
    assert [line["step"] for line in measured(output / "log.jsonl")] == list(range(2, 8 // ranks + 1, 2))
    answers = measured(output / "validation-predictions.jsonl")
    asked = measured(held_out)
    assert [{key: row[key] for key in ("instruction", "input", "output")} for row in answers] == asked
    if method == "all":  # a folder to load: the answers are its own, whoever made them
        (folder,) = output.glob("epoch-1-*")
        tokenizer = MODE[mode].tokenizer.from_pretrained(folder)
        model = MODE[mode].model.from_pretrained(folder).eval()
        prompts = [tokenizer.encode_prompt(row["instruction"] + row["input"], max_src_len=MAX_SRC_LEN) for row in asked]
        alone = [generate_answers(model, tokenizer, [prompt], [6])[0] for prompt in prompts]
        assert [(row["prediction"], row["ended"]) for row in answers] == alone


# The best model, early stopping, and kills


def worsening(after: int):
    """A `prepare` that makes figures get worse after a step, so that a run of any luck has a best one in its midst."""

    def prepare():
        real = evaluation.Validation._measure

        def measure(self, epoch):
            values = real(self, epoch)
            step = self.engine.global_steps
            return values | {"loss": values["loss"] + max(0, step - after), "exact_match": 0.1 * min(step, after)}

        evaluation.Validation._measure = measure

    return prepare


def folder_bytes(output: Path) -> dict[str, str]:
    folders.check_folder(str(output / "best"))
    manifest = json.loads((output / "best" / folders.MANIFEST).read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items()}


@pytest.mark.parametrize(("metric", "ranks", "stage"), [("loss", 1, 2), ("exact_match", 2, 3)])
def test_best_model_and_early_stop_are_the_same_after_kills(tmp_path, bases, rows, held_out, metric, ranks, stage):
    flags = f"""--eval_path {held_out} --eval_steps 1 --best_metric {metric} --early_stopping_patience 3
        --eval_generate text --eval_generate_rows 2 --eval_max_new_tokens 2""".split()
    best_step, killed_at = 4, (4, 7)

    def argv(name):
        return [*command("glm3", "lora", stage, False, bases["glm3"], rows, tmp_path / name), *flags]

    prepare = worsening(best_step)
    codes, text = start(tmp_path / "a", argv("whole"), ranks, prepare)
    assert set(codes.values()) == {0}, text
    assert (
        f"stopping early after step 7: 3 validations without improvement (patience); best at step 4: {metric}" in text
    )
    whole = tmp_path / "whole"
    best = json.loads((whole / "best.json").read_text())
    assert (best["step"], best["metric"]) == (4, metric)
    last = "epoch-1-step-7" if ranks == 1 else "epoch-2-step-7"
    assert (whole / last).is_dir() and len(list(whole.glob("epoch-*"))) == ranks  # four steps an epoch on two ranks

    for step in killed_at:  # while the step is under way

        def killed(step=step):
            prepare()
            before_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))()

        codes, _ = start(tmp_path / "b", argv("killed"), ranks, killed)
        assert codes[0] == -signal.SIGKILL
    # lines of steps that the run went back behind, and one that the kill cut
    with open(tmp_path / "killed" / "validation.jsonl", "a") as file:
        file.write('{"step": 99, "loss": 1.0}\n{"step": 7, "lo')
    codes, text = start(tmp_path / "b", argv("killed"), ranks, prepare)
    assert set(codes.values()) == {0}, text
    assert "going on from" in text and "stopping early after step 7" in text
    killed = tmp_path / "killed"
    assert folder_bytes(killed) == folder_bytes(whole) and result_bytes(killed) == result_bytes(whole)
    assert json.loads((killed / "best.json").read_text()) == best

    def figures(output, name):
        drop = {"seconds", "tokens_per_second", "samples_per_second", "utilisation", "memory_gib"}
        return [{key: v for key, v in line.items() if key not in drop} for line in measured(output / name)]

    for name in ("validation.jsonl", "log.jsonl"):
        assert figures(killed, name) == figures(whole, name)
    assert (killed / "validation-predictions.jsonl").read_bytes() == (
        whole / "validation-predictions.jsonl"
    ).read_bytes()
    assert dict(read_losses(tmp_path / "b" / "losses")) == dict(read_losses(tmp_path / "a" / "losses"))


def test_another_validation_is_another_run_where_the_best_depends_on_it(tmp_path, bases, rows, held_out):
    argv = command("glm3", "lora", 2, False, bases["glm3"], rows, tmp_path / "output")
    argv += ["--eval_path", str(held_out)]
    stop = before_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    codes, _ = start(tmp_path, argv, prepare=stop)
    assert codes == {0: 75}
    shutil.copy(held_out, other := tmp_path / "other.json")
    other.write_text(held_out.read_text() + "\n" + json.dumps({"instruction": "a", "input": "b", "output": "c"}))
    for flags, message in [
        (["--eval_steps", "7"], "--eval_steps: None before, 7 now"),
        (["--eval_path", str(other)], "SHA-256 of --eval_path"),
        (["--early_stopping_patience", "2"], "--early_stopping_patience"),
        (["--best_metric", "ended", "--eval_generate", "text"], "--eval_generate: None before, text now"),
    ]:
        codes, text = start(tmp_path, [*argv, *flags])
        assert codes == {0: 2} and message in text
    shutil.copy(held_out, other)  # the same content; and what only tells more
    flags = [
        "--eval_path",
        str(other),
        "--eval_generate",
        "auto",
        "--eval_batch_size",
        "3",
        "--eval_max_new_tokens",
        "2",
    ]
    codes, text = start(tmp_path, [*argv, *flags])
    assert codes == {0: 0}, text


# What is refused


def test_an_unknown_metric_is_one_error_that_names_the_others(tmp_path, bases, rows, held_out):
    argv = command("glm3", "lora", 2, False, bases["glm3"], rows, tmp_path / "output")
    argv += ["--eval_path", str(held_out), "--best_metric", "f1"]
    for more, names in [([], "loss, perplexity; with --eval_generate"), (["--eval_generate", "classes"], "macro_f1")]:
        codes, text = start(tmp_path, [*argv, *more])
        assert codes == {0: 2}
        (error,) = errors(text)
        assert error.startswith("error: --best_metric f1: there are loss, perplexity") and names in error


def test_flags_that_need_rows_or_each_other_are_refused(held_out):
    needed = ["--mode", "glm3", "--model_name_or_path", ".", "--train_path", __file__]

    def refused(flags):
        with pytest.raises(UserError) as error:
            train.parse_args([*needed, *flags.split()])
        return str(error.value)

    for flags in ("--eval_steps 3", "--early_stopping_patience 2", "--eval_generate auto", "--best_metric f1"):
        assert "--eval_path or --eval_ratio" in refused(flags)
    assert "exclude each other" in refused(f"--eval_path {held_out} --eval_ratio 0.1")
    assert "--eval_ratio 1.5: must be above 0 and below 1" in refused("--eval_ratio 1.5")
    assert "no such file" in refused("--eval_path /nowhere.json")
    assert "--eval_batch_size 0: must be at least 1" in refused(f"--eval_path {held_out} --eval_batch_size 0")


# The split


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def test_the_split_is_stable_and_keeps_equal_prompts_together(tmp_path, tokenizers):
    tokenizer = tokenizers["glm3"]
    rows = [{"instruction": f"{i % 60} 写：", "input": TEXT[i % 60], "output": f"{i}"} for i in range(180)]

    def sides(name, some):
        data = InstructionData(DataSettings(str(write_rows(tmp_path / name, some)), MAX_LEN, MAX_SRC_LEN), tokenizer)
        trained, held = split_rows(data, 0.3)
        assert sorted([*trained, *held]) == list(range(len(some)))
        return {some[i]["output"]: i in set(held) for i in range(len(some))}, len(held)

    first, count = sides("first", rows)
    assert 0.15 * 180 < count < 0.45 * 180
    for i in range(60):
        assert len({first[str(i + k)] for k in (0, 60, 120)}) == 1  # the same prompt
    more = [{"instruction": "新：", "input": TEXT[i], "output": f"new {i}"} for i in range(40)]
    second, _ = sides("second", more + rows[::-1][:150])
    assert all(second[name] == first[name] for name in second if not name.startswith("new"))
    data = InstructionData(DataSettings(str(tmp_path / "first"), MAX_LEN, MAX_SRC_LEN), tokenizer)
    with pytest.raises(DataError, match="leaves none of 180 rows to validate on"):
        split_rows(data, 1e-9)
    with pytest.raises(DataError, match="leaves none of 180 rows to train on"):
        split_rows(data, 1 - 1e-12)


def test_held_out_rows_are_not_trained_on(tmp_path, bases, rows):
    argv = command("glm2", "lora", 2, True, bases["glm2"], rows, tmp_path / "output")
    flags = ["--eval_ratio", "0.3", "--eval_generate", "auto", "--num_train_epochs", "1", "--eval_max_new_tokens", "2"]

    def prepare():
        def record(watch, batches):
            with open(tmp_path / "trained", "a") as file:
                file.write("".join(f"{watch.files[0][1][row]}\n" for batch in batches for row in batch.rows))

        BEFORE_STEP.append(record)

    codes, text = start(tmp_path, [*argv, *flags], prepare=prepare)
    assert codes == {0: 0}, text
    trained = [int(line) for line in (tmp_path / "trained").read_text().split()]
    asked = rows.read_text().splitlines()
    held = [asked.index(json.dumps({k: row[k] for k in ("instruction", "input", "output")}, ensure_ascii=False)) + 1
            for row in measured(tmp_path / "output" / "validation-predictions.jsonl")]  # fmt: skip
    assert len(held) > 2 and sorted(trained + held) == list(range(1, len(asked) + 1))


CALL = {"role": "tool", "name": "weather", "parameters": {"city": "青河"}, "observation": "晴"}


def test_each_learnt_answer_of_a_conversation_is_validated(tmp_path, tokenizers):
    path = tmp_path / "tools.json"
    turns = [{"role": "user", "content": "天气？"}, CALL, {"role": "assistant", "content": "晴。"}]
    turns += [{"role": "user", "content": "谢谢"}, {"role": "assistant", "content": "不客气"}]
    path.write_text(json.dumps({"conversations": turns}, ensure_ascii=False))
    validation = validation_of(path, tokenizers["glm3"], [0])
    kind, names = validation._read_references()
    call = "weather\n```python\ntool_call(city='青河')\n```"
    assert validation.references == [[call], ["晴。"], ["不客气"]]
    assert kind == "tool_calls" and "tool_call_right" in names
    history = [{"role": "user", "content": "天气？"}, {"role": "assistant", "metadata": "weather", "content": call[8:]}]
    asked = tokenizers["glm3"].encode_prompt("晴", history, role="observation")
    (sample,) = validation.data.samples
    assert sample.input_ids[: validation.generated[1].start] == asked


@pytest.mark.parametrize("mode", MODE)
@pytest.mark.parametrize("max_len", [MAX_LEN, 60])
def test_answers_of_a_conversation_are_counted_alike_in_all_families(mode, max_len, tmp_path, tokenizers):
    path = tmp_path / "turns.json"
    turns = [("风扇不转", "查继电器"), ("查了", "换保险丝"), ("风扇不转", "再查一次"), ("好了", "不客气")]
    messages = [{"role": role, "content": text} for pair in turns for role, text in zip(ROLES, pair, strict=True)]
    messages[3]["loss"] = False
    path.write_text(json.dumps({"conversations": messages}, ensure_ascii=False))
    validation = validation_of(path, tokenizers[mode], range(3 if mode != "glm3" else 1), max_len)
    validation._read_references()
    found = [one for (one,) in validation.references]
    assert found == ["查继电器", "再查一次", "不客气"][-len(found) :] and (len(found) == 3 or max_len == 60)


ROLES = ("user", "assistant")


def validation_of(path, tokenizer, rows, max_len=MAX_LEN) -> evaluation.Validation:
    """A validation that generates answers to some samples of a file."""
    limits = {"max_len": max_len, "max_src_len": min(max_len, MAX_SRC_LEN)}
    args = types.SimpleNamespace(**limits, eval_generate="auto", prompt_column=None, train_on=None)
    validation = evaluation.Validation.__new__(evaluation.Validation)
    validation.data = InstructionData(DataSettings(str(path), *limits.values(), several_outputs=True), tokenizer)
    validation.tokenizer, validation.args = tokenizer, args
    validation.generated = evaluation.learnt_answers(validation.data, rows)
    return validation


def test_rows_of_one_line_find_their_references(tmp_path, tokenizers):
    rows = [{"instruction": "写：", "input": TEXT[i], "output": [f"{i}", f"{i}!"]} for i in range(5)]
    path = tmp_path / "array.json"
    path.write_text(json.dumps(rows, ensure_ascii=False))
    validation = validation_of(path, tokenizers["glm3"], [3, 1])
    assert set(validation.data.lines.tolist()) == {1}
    kind, names = validation._read_references()
    assert validation.references == [["3", "3!"], ["1", "1!"]] and kind == "text" and "exact_match" in names


def test_lines_after_the_place_where_a_run_goes_on_are_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    JsonLines(str(path), 0).add(step=1, loss=float("nan"))
    for step in (2, 3):
        JsonLines(str(path), step).add(step=step)
    with open(path, "a") as file:
        file.write('{"step": 4}')  # no end of line: the kill may have cut it
    JsonLines(str(path), 2).add(step=3, again=True)
    assert measured(path) == [{"step": 1, "loss": None}, {"step": 2}, {"step": 3, "again": True}]
    JsonLines(str(path), 0)
    assert path.read_text() == ""
