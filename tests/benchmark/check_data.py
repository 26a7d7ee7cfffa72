"""How long --check_data takes on a large file with every kind of bad row in it, and that it names each with its line.

    python tests/benchmark/check_data.py [--rows 100000] [--mode glm3]

Prints JSON: seconds of the check, findings of each kind, peak memory in MiB. The file has good rows with bad ones among
them (made by tests/samples/test_data_check.py), one of each kind at least; a finding that is missing, or on another
line, or too many is an error. A query that is cut and leaves no room for an answer is of one kind or the other, by the
flags: a second pass, not timed, has the other one.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "samples")]

from conftest import TEXT, TINY
from test_data_check import MAX_SRC_LEN, bad_file, check, findings_of

from glm_models import MODE
from glm_models.tiny import make_tiny_checkpoint
from tuning.samples.check import LENGTHS
from tuning.samples.findings import BROKEN, WARNINGS
from tuning.samples.workers import available_cpus


def compare(found: dict, expected: dict, kinds) -> None:
    for kind in kinds:
        if found.get(kind, []) != expected.get(kind, []):
            sys.exit(f"{kind}: found on lines {found.get(kind, [])}, but is on {expected.get(kind, [])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--mode", choices=MODE, default="glm")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        path, checkpoint, output = Path(work, "rows.json"), f"{work}/{args.mode}", f"{work}/output"
        make_tiny_checkpoint(args.mode, checkpoint, TEXT, **TINY[args.mode])
        expected = bad_file(path, args.rows, max(1, args.rows // 100), args.mode)
        wanted = {*BROKEN, *WARNINGS, *LENGTHS} - {"no_room"} - ({"lost_characters"} if args.mode != "glm" else set())
        if missing := sorted(kind for kind in wanted if not expected.get(kind)):
            sys.exit(f"the file lacks {missing}; take more rows")
        tokenizer = MODE[args.mode].tokenizer.from_pretrained(checkpoint)
        start, cpu = time.perf_counter(), time.process_time()
        check(path, tokenizer, output)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        found, size = findings_of(output), path.stat().st_size
        compare(found, expected, expected.keys() | found.keys())
        check(path, tokenizer, output, max_len=MAX_SRC_LEN + 1)
        compare(findings_of(output), expected | {"no_room": expected["prompt_cut"]}, BROKEN)
    result = {"mode": args.mode, "rows": args.rows, "bytes": size, "cpus": available_cpus()}
    result |= {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}
    result |= {"findings": {kind: len(lines) for kind, lines in found.items()}}
    result |= {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
