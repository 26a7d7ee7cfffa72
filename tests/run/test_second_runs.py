"""A second run into a folder: refused, gone on with, or in the first one's place; run.json; --keep_results; merges that
want one folder. Mostly on folders without weights; some real trainings at the end.
"""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from runs import Launched, command, make_base, make_rows, result_bytes

from tuning import ROOT, folders
from tuning.arguments.train import parse_args
from tuning.errors import FolderError, UserError
from tuning.evaluate.inputs import read_commands
from tuning.run import record as run_record
from tuning.run import results
from tuning.run.resume import Run


def write_result(output: Path, name: str) -> Path:
    """A folder as a training saves one."""
    with folders.new_folder(str(output / name)) as partial:
        Path(partial, "weights").write_text(name)
    return output / name


@pytest.fixture
def trained(tmp_path):
    """A folder as a training with validation and states leaves it, and files that no training wrote."""
    output = tmp_path / "out"
    (output / "states").mkdir(parents=True)
    (output / "tensorboard").mkdir()
    for name in ("epoch-1-step-4", "epoch-2-step-8", "epoch-3-step-12", "best", "states/step-00000006"):
        write_result(output, name)
    for name in (*results.LOGS, "states/latest"):
        (output / name).write_text("{}\n")
    (output / "tensorboard" / "events.out.tfevents.1").write_text("x")
    for name in ("notes.txt", "epoch-1", "epoch-2-step-8-merged/model", "tensorboard/mine", "data_check.jsonl"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("mine")
    return output


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


FOREIGN = {"notes.txt", "epoch-1", "epoch-2-step-8-merged/model", "tensorboard/mine", "data_check.jsonl"}


# Which folders hold results


def test_a_folder_with_results_is_refused_unless_gone_on_with_or_overwritten(trained, tmp_path):
    out, state = str(trained), str(trained / "states" / "step-00000006")
    before = tree(trained)
    for elsewhere in (None, str(tmp_path / "other" / "states" / "step-00000006")):
        with pytest.raises(
            UserError, match=r"holds results of an earlier run .*; or --resume_from_checkpoint .*"
        ) as error:
            results.check_second_run(out, elsewhere, goes_on=False, overwrite=False)
        assert "--overwrite_output_dir removes them" in str(error.value)
        assert "\n" not in str(error.value)
        results.check_second_run(out, elsewhere, goes_on=False, overwrite=True)
    results.check_second_run(out, state, goes_on=True, overwrite=False)
    results.check_second_run(out, state, goes_on=False, overwrite=False)
    with pytest.raises(UserError, match=r"--overwrite_output_dir would remove .*step-00000006, from which"):
        results.check_second_run(out, state, goes_on=False, overwrite=True)
    assert tree(trained) == before


@pytest.mark.parametrize("name", ["epoch-1-step-4", "best", "states/step-00000006"])
def test_one_folder_is_enough(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    assert results.find_traces(str(tmp_path)) == [name]


def test_logs_without_a_line_and_files_of_others_are_no_results(trained, tmp_path):
    assert results.find_traces(str(tmp_path / "new")) == []
    for folder in (*trained.glob("epoch-*-step-?"), *trained.glob("epoch-*-step-??"), trained / "best"):
        shutil.rmtree(folder)
    shutil.rmtree(trained / "states")
    assert results.find_traces(str(trained)) == list(results.LOGS)
    for name in {*results.LOGS} - {"log.jsonl"}:
        (trained / name).unlink()
    assert results.find_traces(str(trained)) == ["log.jsonl"]
    (trained / "log.jsonl").write_text("")  # of a run that ended before its first line
    assert results.find_traces(str(trained)) == []
    (trained / "log.jsonl").unlink()
    assert results.find_traces(str(trained)) == ["tensorboard"]


def test_flags_that_contradict_each_other_are_refused(tmp_path):
    flags = f"--mode glm3 --model_name_or_path {tmp_path} --train_path {__file__} --overwrite_output_dir".split()
    with pytest.raises(UserError, match="exclude each other"):
        parse_args([*flags, "--resume_from_checkpoint"])
    parse_args([*flags, "--resume_from_checkpoint", "elsewhere"])


# --overwrite_output_dir


def test_overwriting_removes_what_a_training_writes_and_nothing_else(trained):
    paths = results.list_removable(str(trained))
    size = sum(path.stat().st_size for path in trained.rglob("*") if path.is_file())
    assert results.size_of(paths) == size - 4 * len(FOREIGN)
    results.remove(paths)
    assert tree(trained) == FOREIGN
    assert results.find_traces(str(trained)) == []
    assert results.list_removable(str(trained)) == []


def test_overwriting_a_link_leaves_what_it_leads_to(trained, tmp_path):
    moved = shutil.move(trained / "epoch-1-step-4", tmp_path / "moved")
    (trained / "epoch-1-step-4").symlink_to(moved)
    results.remove(results.list_removable(str(trained)))
    assert tree(trained) == FOREIGN
    assert Path(moved, "weights").read_text() == "epoch-1-step-4"


def test_foreign_files_inside_a_result_are_named(trained):
    (trained / "epoch-2-step-8" / "predictions-test.jsonl").write_text("{}")
    before = tree(trained)
    with pytest.raises(UserError, match=r"from .*epoch-2-step-8: predictions-test.jsonl; move them away"):
        results.check_second_run(str(trained), None, goes_on=False, overwrite=True)
    (trained / "epoch-3-step-12" / "manifest.json").unlink()
    (trained / "epoch-2-step-8" / "predictions-test.jsonl").unlink()
    with pytest.raises(UserError, match=r"epoch-3-step-12 is not complete: manifest.json: .*; remove it yourself"):
        results.check_second_run(str(trained), None, goes_on=False, overwrite=True)
    assert len(tree(trained)) == len(before) - 2


def test_killed_while_overwriting(trained, monkeypatch):
    """Whatever is there after a kill: no state without its results, whole folders, and the next run is told of them."""
    paths = results.list_removable(str(trained))
    assert paths[0].endswith("states/step-00000006")
    real = shutil.rmtree

    def killed(path, *args, **kwargs):
        (Path(path) / "weights").unlink()
        raise KeyboardInterrupt

    for _ in range(4):
        monkeypatch.setattr(folders.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            results.remove(results.list_removable(str(trained)))
        monkeypatch.setattr(folders.shutil, "rmtree", real)
        folders.sweep(str(trained))
        folders.sweep(str(trained / "states"))
        assert results.find_traces(str(trained))
        for folder in results.list_results(str(trained)):
            folders.check_folder(folder)
    results.remove(results.list_removable(str(trained)))
    assert tree(trained) == FOREIGN


# --keep_results


def names(output: Path) -> list[str]:
    return [os.path.basename(path) for path in results.list_results(str(output))]


def test_the_newest_results_stay_and_best(trained):
    assert results.prune(str(trained), 12, 3) == []
    assert results.prune(str(trained), 12, 2) == []
    assert names(trained) == ["epoch-3-step-12", "epoch-2-step-8"]
    assert results.prune(str(trained), 12, 1) == []
    assert names(trained) == ["epoch-3-step-12"]
    assert {"best/weights", "best.json", *FOREIGN} < tree(trained)
    write_result(trained, "epoch-10-step-100")  # by number, not by name
    results.prune(str(trained), 100, 1)
    assert names(trained) == ["epoch-10-step-100"]


def test_results_of_a_course_that_was_left_go(trained):
    write_result(trained, "epoch-2-step-6")  # gone on from step 4
    results.prune(str(trained), 6, 2)
    assert names(trained) == ["epoch-2-step-6", "epoch-1-step-4"]


def test_results_that_hold_foreign_files_stay(trained):
    (trained / "epoch-1-step-4" / "predictions-test.jsonl").write_text("{}")
    (trained / "epoch-2-step-8" / "manifest.json").unlink()
    warnings = results.prune(str(trained), 12, 1)
    assert len(names(trained)) == 3
    assert "holds predictions-test.jsonl, which this training did not write" in " ".join(warnings)
    assert "epoch-2-step-8 is not complete" in " ".join(warnings)


# run.json


def start(**change) -> dict:
    flags = {"resume_from_checkpoint": None, "overwrite_output_dir": False} | change
    return {"flags": flags, "run": {"settings": {"a": 1}}, "ended": None, "exit": None, "best": None}


def test_starts_are_listed_with_their_ends(tmp_path):
    out = str(tmp_path)
    record = run_record.RunRecord(out, start())
    record.write()
    assert run_record.read_starts(out)[0]["ended"] is None  # killed now, it would stay so
    record = run_record.RunRecord(out, start(resume_from_checkpoint="auto"))
    with pytest.raises(KeyError), record.until_the_end():
        raise KeyError("a bug")
    (tmp_path / "best.json").write_text('{"step": 3}')
    record = run_record.RunRecord(out, start(resume_from_checkpoint="auto"))
    with record.until_the_end():
        pass
    found = run_record.read_starts(out)
    assert [each["exit"] for each in found] == [None, "KeyError: 'a bug'", "done"]
    assert found[2]["best"] == {"step": 3}
    assert found[2]["ended"].endswith("+00:00")
    assert len(run_record.RunRecord(out, start()).starts) == 1  # another run
    for content in ("{", "[]", '{"format": 2}', '{"format": 1, "starts": 3}', '{"format": 1, "starts": [3]}'):
        (tmp_path / "run.json").write_text(content)
        assert run_record.read_starts(out) == []


def test_a_run_without_a_state_restarts_its_own_results_only(tmp_path):
    run = Run({"a": 1, "b": (2, 3)}, 1, 2)
    traces = ["epoch-1-step-4"]
    run_record.check_restart(str(tmp_path), [], run)
    with pytest.raises(UserError, match=r"holds results of a run that left no run.json \(epoch-1-step-4\), and no"):
        run_record.check_restart(str(tmp_path), traces, run)
    run_record.RunRecord(str(tmp_path), start() | {"run": run._asdict()}).write()
    run_record.check_restart(str(tmp_path), traces, run)
    with pytest.raises(UserError, match="holds results of a run with other settings"):
        run_record.check_restart(str(tmp_path), traces, Run({"a": 2}, 1, 2))


def test_the_commit_is_known_or_said_to_be_unknown(monkeypatch, tmp_path):
    def git(*arguments):
        import subprocess

        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(run_record, "ROOT", str(tmp_path))
    assert run_record.describe_git() is None
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    found = run_record.describe_git()
    assert len(found["commit"]) == 40
    assert not found["changed"]
    (tmp_path / "code.py").write_text("2")
    assert run_record.describe_git()["changed"]
    (tmp_path / "vendored").mkdir()
    monkeypatch.setattr(run_record, "ROOT", str(tmp_path / "vendored"))
    assert run_record.describe_git() is None  # the commit of another project would be a lie
    monkeypatch.setenv("PATH", "")
    assert run_record.describe_git() is None


# One name, several processes


def claim(folder, entered, go_on, outcome):
    try:
        with folders.claimed_folder(folder) as partial:
            Path(partial, "who").write_text(str(os.getpid()))
            entered.set()
            go_on.wait(300)
        outcome.put((os.getpid(), ""))
    except FolderError as error:
        outcome.put((os.getpid(), str(error)))


def test_of_two_merges_at_once_one_gets_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    folder = str(tmp_path / "merged")
    entered, go_on, outcome = context.Event(), context.Event(), context.Queue()
    first = context.Process(target=claim, args=(folder, entered, go_on, outcome))
    first.start()
    assert entered.wait(300)
    assert folders.sweep(str(tmp_path)) == []  # a training that starts beside it leaves it alone
    for _ in range(3):
        with pytest.raises(FolderError, match=r"another process is writing .*merged; name another"):
            folders.claimed_folder(folder).__enter__()
    go_on.set()
    assert outcome.get(timeout=300) == (first.pid, "")
    first.join()
    assert Path(folder, "who").read_text() == str(first.pid)
    folders.check_folder(folder, nothing_else=True)
    with pytest.raises(FolderError, match=r"merged is not empty"):
        folders.claimed_folder(folder).__enter__()
    assert os.listdir(tmp_path) == ["merged"]
    folders.check_folder(folder, nothing_else=True)


def test_many_merges_that_end_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    for i in range(10):
        folder = str(tmp_path / f"merged-{i}")
        entered, go_on, outcome = context.Event(), context.Event(), context.Queue()
        go_on.set()
        processes = [context.Process(target=claim, args=(folder, entered, go_on, outcome)) for _ in range(4)]
        for process in processes:
            process.start()
        outcomes = dict(outcome.get(timeout=300) for _ in processes)
        for process in processes:
            process.join()
        (winner,) = (pid for pid, error in outcomes.items() if not error)
        assert Path(folder, "who").read_text() == str(winner)
        folders.check_folder(folder, nothing_else=True)
    assert len(os.listdir(tmp_path)) == 10


def test_what_a_killed_merge_left_is_no_part_of_the_next_one(tmp_path):
    partial = tmp_path / "merged.partial"
    (partial / "deep").mkdir(parents=True)
    (partial / "model.safetensors").write_text("half")
    (partial / "deep" / "link").symlink_to(tmp_path)
    with folders.claimed_folder(str(tmp_path / "merged")) as folder:
        Path(folder, "whole").write_text("whole")
    assert tree(tmp_path) == {"merged/whole", "merged/manifest.json"}
    with pytest.raises(KeyError), folders.claimed_folder(str(tmp_path / "other")) as folder:
        raise KeyError
    assert os.listdir(tmp_path) == ["merged"]


# Real trainings


class Trial:
    """Trainings into one folder, the flags of runs.command without --resume_from_checkpoint."""

    def __init__(self, folder: Path, base: Path, rows: Path, ranks: int):
        self.output, self.log, self.losses, self.ranks = folder / "out", folder / "log", folder / "losses", ranks
        argv = command("glm3", "lora", 2, False, base, rows, self.output)
        self.argv = argv[: argv.index("--save_state_steps")] + ["--show_loss_step", "3"]

    def run(self, *more: str, prepare=lambda: None) -> tuple[set[int], str]:
        self.log.unlink(missing_ok=True)
        run = Launched([*self.argv, *more], self.ranks, self.losses, self.log, prepare)
        return set(run.wait().values()), self.log.read_text()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    work = tmp_path_factory.mktemp("second")
    return make_base("glm3", work / "base"), make_rows(work / "rows.json", 16)


@pytest.mark.parametrize("ranks", [1, 2])
def test_second_runs(inputs, tmp_path, ranks):
    base, rows = inputs
    bf16 = json.loads(Path(ROOT, "ds_zero2_no_offload.json").read_text())
    bf16["bf16"] = {"enabled": True}
    (tmp_path / "bf16.json").write_text(json.dumps(bf16))
    trial = Trial(tmp_path, base, rows, ranks)
    out = trial.output
    codes, text = trial.run("--keep_results", "1", "--ds_file", str(tmp_path / "bf16.json"))
    assert codes == {0}, text
    steps = 12 // ranks
    assert "results: 3 of 0.0" in text
    assert "the newest 1 are kept (--keep_results)" in text
    assert names(out) == [f"epoch-3-step-{steps}"]
    assert not (out / names(out)[0] / "README.md").exists()
    (only,) = run_record.read_starts(str(out))
    assert (only["exit"], only["run"]["ranks"], len(only["devices"])) == ("done", ranks, ranks)
    assert only["flags"]["learning_rate"] == 5e-3
    assert only["ds_config"]["bf16"]["enabled"] is True
    assert only["run"]["settings"]["SHA-256 of --train_path"]
    assert set(only["versions"]) > {"python", "torch", "deepspeed"}
    assert read_commands(str(out)) == {"train": only["command"]}

    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    codes, text = trial.run("--learning_rate", "1e-3")
    assert codes == {2}
    (line,) = (line for line in text.splitlines() if line.startswith("error:"))
    assert f"holds results of an earlier run (epoch-3-step-{steps}, log.jsonl, summary.json)" in line
    codes, text = trial.run("--learning_rate", "1e-3", "--resume_from_checkpoint", "auto")
    assert codes == {2}
    assert "holds results of a run with other settings" in text
    codes, text = trial.run("--overwrite_output_dir", "--lora_module_name", "nothing")  # found when the model is there
    assert codes == {2}
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    codes, text = trial.run("--learning_rate", "1e-3", "--overwrite_output_dir", "--save_model_step", "5")
    assert codes == {0}, text
    assert names(out)[0] == f"epoch-3-step-{steps}"
    assert len(names(out)) == (5 if ranks == 1 else 4)
    assert "--keep_results N would keep the newest N" in text
    (only,) = run_record.read_starts(str(out))
    assert only["flags"]["learning_rate"] == 1e-3
    assert len(list((out / "tensorboard").iterdir())) == 1
    assert [json.loads(line)["lr"] <= 1e-3 for line in (out / "log.jsonl").open()] == [True] * (steps // 3)


def test_keep_results_and_run_json_through_a_stop(inputs, tmp_path):
    trials = {name: Trial(tmp_path / name, *inputs, 1) for name in ("whole", "stopped")}
    flags = ["--keep_results", "2", "--save_model_step", "5", "--resume_from_checkpoint", "auto"]
    for trial in trials.values():
        trial.log.parent.mkdir()
    assert trials["whole"].run(*flags)[0] == {0}

    from test_stops import before_step

    stop = before_step(9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert trials["stopped"].run(*flags, prepare=stop)[0] == {75}
    assert names(trials["stopped"].output) == ["epoch-2-step-8", "epoch-2-step-5"]
    codes, text = trials["stopped"].run(*flags)
    assert codes == {0}, text
    assert result_bytes(trials["stopped"].output) == result_bytes(trials["whole"].output)
    assert names(trials["stopped"].output) == ["epoch-3-step-12", "epoch-3-step-10"]
    first, second = run_record.read_starts(str(trials["stopped"].output))
    assert first["exit"].startswith("StopTraining: stopped by SIGTERM after step 9")
    assert second["exit"] == "done"
    assert second["state"].endswith("step-00000009")
    # killed before there was a state: the same line begins again
    shutil.rmtree(trials["stopped"].output / "states")
    codes, text = trials["stopped"].run(*flags)
    assert codes == {0}, text
    assert result_bytes(trials["stopped"].output) == result_bytes(trials["whole"].output)
    assert len(run_record.read_starts(str(trials["stopped"].output))) == 3
    assert len(list((trials["stopped"].output / "tensorboard").iterdir())) == 1
