"""How fast instruction files are prepared: against SentencePiece alone, the second start, and memory on a large file.

    python tests/benchmark/data_preparation.py --checkpoint glm3=ChatGLM3-6B/ --data data/spo_0.json data/d2q_0.json
    python tests/benchmark/data_preparation.py --rows 100000 1000000 --json results.json
    python tests/benchmark/data_preparation.py --runs 0 --calls --rows 200000 1000000      # memory alone

Only the tokenizer files of a checkpoint folder are read. Without --checkpoint, a tokenizer of each family is trained on
the data files, with --vocab_size pieces. Rows are repeated, each time with another number in front of their texts,
until a file has --at_least so many: of a few rows one would measure how long it takes to start. Of each data file there
are also conversations, of TURNS rows each, and for ChatGLM3 those with tools of --tools, once as they are and once with
tools described as long as users describe them (DESCRIBED).

"Alone" is `sp.encode(texts, num_threads=N)`, one call with all texts of the file in memory, as they are after reading:
strings that SentencePiece sees for the first time. Which texts these are:

- ratio: of each row the text of each message as the chat writes it, once. So a tool's description counts in each row
  that has it. ChatGLM and ChatGLM2 write a conversation as one text: counted are its last prompt, and each answer.
- to_distinct: of these texts the different ones of the whole file, each once: less than a program can do that reads a
  file from its beginning and keeps little of it.
- to_prompts: ChatGLM and ChatGLM2 have a sample for each answer of a conversation; counted are the prompts of all of
  them, in which earlier turns come again, and each answer. Other files as in ratio.

Alone and preparation are run in turn, both on all CPUs (preparation on at most workers.MOST), and each ratio is the
median of the pairs: 0.8 means that preparation takes 1.25 times as long as SentencePiece alone. Times are those of the
clock, so nothing else may run beside; "cpu" has the same ratio for seconds of the CPU, of all threads and processes
together. Memory is the most that all processes have together, shared pages counted once.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from process import status

from glm_models import MODE
from glm_models.tiny import make_tiny_checkpoint, read_lines
from tuning.samples.dataset import DataSettings, InstructionData, prepare
from tuning.samples.formats import to_dialogue
from tuning.samples.mixture import shared_samples
from tuning.samples.row_files import read_rows
from tuning.samples.workers import available_cpus

TURNS = 4  # of a conversation
DESCRIBED = {  # what a tool takes, as the OpenAI API has it described
    "type": "object",
    "properties": {
        "number": {"type": "string", "description": "车辆的编号或订单的编号，没有时写空字符串"},
        "days": {"type": "integer", "description": "查询最近多少天的记录，默认为 7"},
        "kind": {"type": "string", "enum": ["故障", "维修", "保养"], "description": "要查询的记录的种类"},
    },
    "required": ["number"],
}
ROOT = Path(__file__).resolve().parent.parent.parent


def texts_of(tokenizer, path: str, every: bool = False) -> list[str]:
    """All texts of a file as SentencePiece gets them: the last prompt in its template and all answers, or messages.

    Args:
        every: the prompt of each answer, not the last one alone; an earlier turn is then there several times.
    """
    texts = []
    for _, row in read_rows(path, empty_outputs=True):
        dialogue = to_dialogue(row)
        if tokenizer.mode == "glm3":
            texts += [message.content for message in tokenizer._with_tools(dialogue)]
            continue
        each = [message.content for message in dialogue.messages]
        pairs = list(zip(each[::2], each[1::2], strict=True))
        turns = range(len(pairs)) if every else [len(pairs) - 1]
        texts += (*(tokenizer.build_prompt(pairs[turn][0], pairs[:turn]) for turn in turns), *each[1::2])
    return [tokenizer._to_pieces_text(text) for text in texts]


def cpu_time() -> float:
    """Seconds of the CPU that this process and those that it started have taken."""
    return sum(os.times()[:4])


def both_seconds(action) -> np.ndarray:
    """Seconds of the clock and of the CPU, float64 [2]."""
    start = np.array([time.perf_counter(), cpu_time()])
    action()
    return np.array([time.perf_counter(), cpu_time()]) - start


def seconds(action) -> float:
    return both_seconds(action)[0]


def compare(tokenizer, path: str, limits: tuple[int, int], runs: int) -> dict:
    """Preparation against SentencePiece alone on one file, and the second start."""
    texts, every, threads = texts_of(tokenizer, path), texts_of(tokenizer, path, every=True), available_cpus()
    distinct = [*dict.fromkeys(texts)]
    settings = DataSettings(path, *limits, empty_outputs=True)

    def alone(some):
        return tokenizer.sp_model.encode(some, num_threads=threads)

    def alone_takes(some):
        some = [text.encode().decode() for text in some]  # SentencePiece keeps a string's UTF-8 for the next time
        return both_seconds(lambda: alone(some))

    def ours(folder):
        return prepare(settings, tokenizer, folder)

    tokens = sum(map(len, alone(texts)))
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        file = ours(f"{folder}/kept")
        for i in range(runs):
            whole, ours_took = alone_takes(texts), both_seconds(lambda i=i: ours(f"{folder}/{i}"))
            others = [alone_takes(some) if len(some) != len(texts) else whole for some in (distinct, every)]
            pairs.append([*(some[0] / ours_took[0] for some in (whole, *others)), *ours_took, whole[1] / ours_took[1]])
        data = InstructionData(settings, tokenizer, file)
        kept = int(data.lengths.sum())
        again = statistics.median(
            seconds(lambda: InstructionData(settings, tokenizer, ours(f"{folder}/kept"))) for _ in range(runs)
        )
    ratio, to_distinct, to_prompts, took, cpu_took, cpu_ratio = map(statistics.median, zip(*pairs, strict=True))
    rows = sum(1 for _ in read_rows(path, empty_outputs=True))
    return {
        "mode": tokenizer.mode,
        "file": os.path.basename(path).partition("-")[2],
        "rows": rows,
        "prompts_cut": data.prompts_cut,
        "cpus": threads,
        "tokens_a_row": tokens / rows,
        "us_a_row": took / rows * 1e6,
        "cpu_us_a_row": cpu_took / rows * 1e6,
        "ratio": ratio,
        "cpu": cpu_ratio,
        "to_distinct": to_distinct,
        "to_prompts": to_prompts,
        "second_start_s_per_million_tokens": again / kept * 1e6,
    }


class Together:
    """Inside a with block: the most memory that this process and those that it starts have together, in MiB.

    Shared pages count once. Sampled; a kernel that does not tell leaves 0.
    """

    def __init__(self):
        self.most, self.ended = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    def _watch(self):
        me = psutil.Process()
        while not self.ended.wait(0.1):
            with contextlib.suppress(psutil.Error, AttributeError):  # one that just ended
                found = sum(one.memory_full_info().pss for one in (me, *me.children())) / 2**20
                self.most = max(self.most, found)


def measure_large(mode: str, folder: str, path: str) -> dict:
    """Time and memory of preparing one file, in this process and for the first time; and of looking for samples that
    two files share, of so many rows each."""

    def peak():  # (that of getrusage counts the process that started this one)
        return status("VmHWM") / 2**20

    tokenizer = MODE[mode].tokenizer.from_pretrained(folder)
    before = peak()
    with tempfile.TemporaryDirectory() as cache:
        settings = DataSettings(path, 1024, 512)
        with Together() as together:
            first, cpu = both_seconds(lambda: prepare(settings, tokenizer, cache))
        prepared = max(together.most, peak())
        second = seconds(lambda: prepare(settings, tokenizer, cache))
        data = InstructionData(settings, tokenizer, prepare(settings, tokenizer, cache))
        opened = peak()
        shared = seconds(lambda: shared_samples([data, data], None))
    return {
        "mode": mode,
        "rows": len(data),
        "tokens": int(data.lengths.sum()),
        "file_mib": os.path.getsize(path) / 2**20,
        "first_s": first,
        "first_cpu_s": cpu,
        "second_s_per_million_tokens": second / int(data.lengths.sum()) * 1e6,
        "mib_before": before,
        "mib_peak": prepared,
        "mib_with_data_open": opened,
        "shared_samples_s": shared,
        "mib_with_shared_samples": peak(),
    }


def write_repeated(path: str, source: str, at_least: int) -> None:
    """The rows of a file as often as it takes, each its own."""
    rows = [row for _, row in read_rows(source, empty_outputs=True)]
    with open(path, "w", encoding="utf-8") as file:
        for time in range(-(-at_least // len(rows))):
            for row in rows:
                again = {"input": f"{time} {row['input']}", "output": f"{time} {row['output']}"} if time else {}
                file.write(json.dumps(row | again, ensure_ascii=False) + "\n")


def write_conversations(path: str, source: str, at_least: int) -> None:
    """Conversations of TURNS rows of a file, each its own."""
    rows = [row for _, row in read_rows(source, empty_outputs=True)]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(at_least):
            messages = []
            for turn in range(TURNS):
                row = rows[(i * TURNS + turn) % len(rows)]
                messages.append({"role": "user", "content": f"{i} {row['instruction']}{row['input']}"})
                messages.append({"role": "assistant", "content": f"{i} {row['output']}"})
            file.write(json.dumps({"conversations": messages}, ensure_ascii=False) + "\n")


def write_tools(path: str, source: str, at_least: int, described: bool) -> None:
    """The conversations of a file as often as it takes, each its own except for its tools.

    Args:
        described: each tool gets the schema DESCRIBED besides.
    """
    with open(source, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(at_least):
            row = json.loads(json.dumps(rows[i % len(rows)]))
            for message in row["conversations"]:
                if message["role"] == "tool":
                    message["parameters"]["row"] = i
                    message["observation"] = {"row": i, "found": message["observation"]}
                else:
                    message["content"] = f"{i} {message['content']}"
            for tool in row["tools"] if described else ():
                tool["parameters"] = DESCRIBED
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_large(path: str, rows: int, turns: int, tools: bool) -> None:
    """Short rows, each its own; of more than one turn they are conversations, with tools each answers after a call."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            row = {
                "instruction": "抽取故障：",
                "input": f"第{i}辆车水泵漏水，{i % 97}天后换。",
                "output": f"水泵_部件故障_漏水{i % 89}",
            }
            if turns > 1:
                question, answer = row["instruction"] + row["input"], row["output"]
                pairs = ((f"{question}{turn}", f"{answer}{turn}") for turn in range(turns))
                texts = [text for pair in pairs for text in pair]
                roles = ("user", "assistant") * turns
                row = {"conversations": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}
            if tools:
                call = {"role": "tool", "name": "find_car", "parameters": {"number": i, "days": i % 97}}
                row = {"tools": [{"name": "find_car", "description": "查车：number 编号，days 天数"}]} | {
                    "conversations": [
                        {"role": "user", "content": f"第{i}辆车怎么样？"},
                        call | {"observation": {"状态": f"水泵漏水{i % 89}"}},
                        {"role": "assistant", "content": f"第{i}辆车水泵漏水{i % 89}，{i % 97}天后换。"},
                    ]
                }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def show(results: list[dict]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(results[0]) + " |\n" + "|---" * len(results[0]) + "|")
    for result in results:
        cells = (
            f"{v:,.2f}" if isinstance(v, float) and v < 100 else f"{v:,.0f}" if isinstance(v, float) else str(v)
            for v in result.values()
        )
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", default=[], metavar="MODE=FOLDER", help="may be given again")
    parser.add_argument("--vocab_size", type=int, help="pieces of the trained tokenizers; default: one per character")
    parser.add_argument("--data", nargs="+", default=[str(ROOT / "data" / f"{n}_0.json") for n in ("spo", "d2q")])
    parser.add_argument(
        "--at_least", type=int, default=20_000, help="rows of each data file, repeated; 1 for as they are"
    )
    parser.add_argument("--max_len", type=int, default=1560)
    parser.add_argument("--max_src_len", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=7, help="pairs of runs; 0: nothing is compared")
    parser.add_argument("--rows", type=int, nargs="*", default=[], help="also prepare generated files of so many rows")
    parser.add_argument("--turns", type=int, default=1, help="of the generated rows; above 1 they are conversations")
    parser.add_argument("--calls", action="store_true", help="the generated rows are conversations with a tool call")
    parser.add_argument("--tools", default=str(ROOT / "data" / "tools_0.json"), help="conversations with tools")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--large", nargs=3, help=argparse.SUPPRESS)  # mode, folder, file: one measurement on its own
    args = parser.parse_args()
    if args.large:
        print(json.dumps(measure_large(*args.large)))
        return

    with tempfile.TemporaryDirectory() as scratch:
        folders = dict(item.split("=", 1) for item in args.checkpoint)
        for mode in MODE if not folders else ():
            folders[mode] = f"{scratch}/{mode}"
            make_tiny_checkpoint(mode, folders[mode], read_lines(args.data), layers=1, vocab_size=args.vocab_size)
        repeated = {f"{scratch}/{i}-{os.path.basename(path)}": path for i, path in enumerate(args.data)}
        for path, source in repeated.items():
            write_repeated(path, source, args.at_least)
        for i, source in enumerate(args.data):
            path = f"{scratch}/{i}-{TURNS} turns of {os.path.basename(source)}"
            write_conversations(path, source, -(-args.at_least // TURNS))
            repeated[path] = source
        tools = [f"{scratch}/{i}-{how}{os.path.basename(args.tools)}" for i, how in enumerate(("", "described "))]
        for described, path in enumerate(tools):
            write_tools(path, args.tools, args.at_least, bool(described))
        results = {"compared": [], "large": []}
        for mode, folder in folders.items() if args.runs else ():
            tokenizer = MODE[mode].tokenizer.from_pretrained(folder)
            for path in (*repeated, *(tools if mode == "glm3" else [])):
                # a description is long where the vocabulary has few of its words
                limits = (6144, 4096) if path in tools else (args.max_len, args.max_src_len)
                results["compared"].append(compare(tokenizer, path, limits, args.runs))
        if results["compared"]:
            show(results["compared"])
        # a process each: the peak of memory is that of a process
        for rows in args.rows:
            large = f"{scratch}/large.json"
            write_large(large, rows, args.turns, args.calls)
            for mode, folder in folders.items():
                if args.calls and mode != "glm3":
                    continue
                command = [sys.executable, __file__, "--large", mode, folder, large]
                results["large"].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        if results["large"]:
            show(results["large"])
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
