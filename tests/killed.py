"""Kill trainings at random moments, let them go on, and compare with one that was never killed: every loss and every
byte of the result must be the same.

    python tests/killed.py --kills 20                # every family, method, ZeRO stage, 1 and 2 ranks, packed or not
    python tests/killed.py --kills 50 --in-save      # always while a state is being written, which is slowed down
    python tests/killed.py --kills 3 --conversations # rows of several answers, tool calls and plain text between them
    python tests/killed.py --kills 10 --pipeline     # every family, all parameters and LoRA, in two stages
    python tests/killed.py --kills 3 --quantized     # every family, LoRA and P-Tuning, on a base in 4 bits
"""

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
from runs import (
    LIMIT,
    STAGES,
    Launched,
    command,
    make_base,
    make_conversations,
    make_rows,
    read_losses,
    result_bytes,
)

import utils
from glm_models import MODE
from tuning import folders, methods
from tuning.arguments.quantization import METHODS
from tuning.run import resume


def slow_saving() -> None:
    """Make the writing of a state take long, so that kills fall into it."""
    described = folders._describe
    publish = resume.Checkpoints._publish

    def slowly(path, flush=False):
        time.sleep(0.05)
        return described(path, flush)

    def slow_publish(self, *args):
        time.sleep(0.1)
        publish(self, *args)
        time.sleep(0.1)

    folders._describe, resume.Checkpoints._publish = slowly, slow_publish


def compare(folder: Path, argv, ranks: int, kills: int, seed: str, in_save: bool = False) -> dict[str, int]:
    """Kill and resume until there were so many kills, and the last run has come to its end.

    Returns:
        kills, resumes, rounds from the start to the end; differences of losses or results are an AssertionError.
    """
    chance = random.Random(seed)
    log = folder / "log"
    whole = folder / "whole"
    # the first of all compiles DeepSpeed's operations, if nobody has
    assert Launched(argv(whole), ranks, folder / "whole-losses", log).wait(600) == dict.fromkeys(range(ranks), 0), log
    expected = read_losses(folder / "whole-losses")
    expected_bytes = result_bytes(whole)
    assert len(expected) == expected[-1][0] and len(expected_bytes) > 3
    counts = {"kills": 0, "resumes": 0, "rounds": 0, "steps_again": 0}
    while counts["kills"] < kills:
        output, losses = folder / "killed", folder / "killed-losses"
        shutil.rmtree(output, ignore_errors=True)
        losses.unlink(missing_ok=True)
        codes, first = None, True
        while codes is None:
            counts["resumes"] += not first
            first = False
            before = len(read_losses(losses))
            run = Launched(argv(output), ranks, losses, log, slow_saving if in_save else lambda: None)
            if counts["kills"] < kills:
                wait_for_moment(run, chance, output, losses, before, in_save)
            else:
                run.wait()
            if run.running():
                run.kill()
                run.wait(30)
                counts["kills"] += 1
                continue
            codes = run.wait()
        assert codes == dict.fromkeys(range(ranks), 0), log.read_text()[-3000:]
        counts["rounds"] += 1
        seen = read_losses(losses)
        counts["steps_again"] += len(seen) - len(expected)
        wanted = dict(expected)
        assert {step for step, _ in seen} == set(wanted)
        assert all(wanted[step] == loss for step, loss in seen), "a loss differs"
        assert result_bytes(output) == expected_bytes, "a result differs"
    return counts


def wait_for_moment(
    run: Launched, chance: random.Random, output: Path, losses: Path, before: int, in_save: bool
) -> None:
    """Wait until it is time to kill: while a state is written, or anywhere: one time in four before the first step."""
    end = time.monotonic() + LIMIT
    if in_save:
        while run.running() and not list(output.glob(f"states/*{folders.PARTIAL}")) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.6))
        return
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, 3))
        return
    while run.running() and len(read_losses(losses)) == before and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.25))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each setting")
    parser.add_argument("--in-save", action="store_true", help="kill while a state is written; one setting only")
    parser.add_argument("--conversations", action="store_true", help="rows are conversations, with plain text between")
    parser.add_argument("--pipeline", action="store_true", help="in two stages, on two ranks")
    parser.add_argument("--quantized", action="store_true", help="on a base in 4 bits, on two ranks")
    parser.add_argument("--sample", action="store_true", help="one setting of each family and method, half the rows")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    args = parser.parse_args(argv)
    utils.silence_libraries(verbose=False)
    rest = list(itertools.product(STAGES, (1, 2), (False, True)))
    pairs = list(itertools.product(MODE, methods.TRAIN_TYPE))
    settings = [(*pair, *setting) for pair in pairs for setting in rest]
    if args.sample:
        settings = [(*pair, *rest[i * 5 % 8]) for i, pair in enumerate(pairs)]
    if args.in_save:
        settings = [("glm3", "all", 2, 2, False)]
    more = ["--pipeline_stages", "2"] if args.pipeline else []
    if args.pipeline:
        settings = [(mode, method, 2, 2, method == "all") for mode, method in itertools.product(MODE, ("all", "lora"))]
    if args.quantized:
        more += ["--quantization_bit", "4"]
        settings = [(mode, method, 2, 2, method == "lora") for mode, method in itertools.product(MODE, METHODS)]
    with tempfile.TemporaryDirectory() as work:
        bases = {mode: make_base(mode, Path(work, mode)) for mode in MODE}
        rows = dict.fromkeys(MODE, make_rows(Path(work, "rows.json")))
        if args.conversations:
            count = 12 if args.sample else 24
            rows = {mode: make_conversations(Path(work, f"{mode}.json"), mode, count) for mode in MODE}
        total: dict[str, int] = {}
        for mode, method, stage, ranks, packing in settings:
            name = f"{mode} {method} ZeRO-{stage} {ranks} rank{'s' * (ranks > 1)}{' packed' * packing}"
            name += " in 2 stages" * args.pipeline + " in 4 bits" * args.quantized
            if args.only not in name:
                continue
            folder = Path(work, name.replace(" ", "-"))
            folder.mkdir()

            def argv(output, mode=mode, method=method, stage=stage, packing=packing):
                return [*command(mode, method, stage, packing, bases[mode], rows[mode], output), *more]

            start = time.monotonic()
            counts = compare(folder, argv, ranks, args.kills, name, args.in_save)
            for key, value in counts.items():
                total[key] = total.get(key, 0) + value
            print(f"{name}: {counts}, 0 differences, {time.monotonic() - start:.0f} s", flush=True)
            shutil.rmtree(folder)
        print(f"all: {total}, 0 differences")


if __name__ == "__main__":
    main()
