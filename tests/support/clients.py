"""Programs that serve models, asked for greedy answers.

    PYTHON tests/support/clients.py CLIENT TASK.json ANSWERS.json

PYTHON is that of the program's environment, which has nothing of this project. The task has "folder" and "talks"
(lists of messages in OpenAI's form), and what a client needs beside. The answers are a list of texts as the program
gives them, or what else the client's docstring says.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

LONGEST = 96  # tokens of an answer
START = 600  # seconds in which a server has to be ready


def vllm(task: dict) -> list[str]:
    """llm.chat. Task: "tokenizer", a folder, if not that of the model; "adapter", a folder."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8}
    adapter = task.get("adapter")
    if adapter:
        settings |= {"enable_lora": True, "max_lora_rank": 16}
    llm = LLM(task["folder"], tokenizer=task.get("tokenizer"), **settings)
    request = LoRARequest("tuned", 1, adapter) if adapter else None
    sampling = SamplingParams(temperature=0, max_tokens=LONGEST)
    outputs = llm.chat(task["talks"], sampling, lora_request=request, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def pipeline(task: dict) -> list[str]:
    """transformers' text-generation pipeline."""
    from transformers import pipeline

    generate = pipeline("text-generation", task["folder"], device="cpu", trust_remote_code=False)
    settings = {"do_sample": False, "max_new_tokens": LONGEST, "return_full_text": False}
    return [generate(talk, **settings)[0]["generated_text"] for talk in task["talks"]]


def chatglm_cpp(task: dict) -> list[str]:
    """chatglm.cpp: its convert command, then Pipeline.chat. Task: "file" to write; "adapter", a folder."""
    from chatglm_cpp import Pipeline

    words = [sys.executable, "-m", "chatglm_cpp.convert", "-i", task["folder"], "-t", "f32", "-o", task["file"]]
    words += ["-l", task["adapter"]] if task.get("adapter") else []
    subprocess.run(words, check=True)
    model = Pipeline(task["file"])
    settings = {"do_sample": False, "max_new_tokens": LONGEST}
    return [model.chat(talk, **settings).content for talk in task["talks"]]


def llama_cpp(task: dict) -> dict:
    """llama-cpp-python with a GGUF file ("folder" is the file).

    Task: "adapter", a GGUF file; "texts"; "prompts", lists of ids. Returns "answers", "ids" of the texts without
    special tokens, and "more": the ids that follow each prompt.
    """
    from llama_cpp import Llama

    kinds = {"type_k": 0, "type_v": 0}  # float32: the usual cache is in half precision
    model = Llama(task["folder"], lora_path=task.get("adapter"), n_ctx=1024, verbose=False, n_threads=1, **kinds)
    answers = []
    for talk in task["talks"]:
        model.reset()
        found = model.create_chat_completion(talk, temperature=0, max_tokens=LONGEST)
        answers.append(found["choices"][0]["message"]["content"])
    ids = [model.tokenize(text.encode(), add_bos=False, special=False) for text in task.get("texts", ())]
    more = []
    for prompt in task.get("prompts", ()):
        model.reset()
        more.append([token for token, _ in zip(model.generate(prompt, temp=0), range(LONGEST), strict=False)])
    return {"answers": answers, "ids": ids, "more": more}


def server(task: dict) -> list[dict]:
    """An OpenAI-compatible server. Task: "command" that starts it, "port", "model", "tools" of talks. To: messages."""
    url = f"http://127.0.0.1:{task['port']}"
    words = [sys.executable, *task["command"]]
    with open(f"{task['log']}", "w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | task.get("environment", {}))
    try:
        end = time.monotonic() + START
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start: {Path(task['log']).read_text()[-3000:]}")
            time.sleep(1)
        tools = task.get("tools") or [None] * len(task["talks"])
        more = {"tool_choice": "none"} if task.get("has_tool_choice", True) else {}  # who asked reads the call
        return [_ask(url, task["model"], talk, some, more) for talk, some in zip(task["talks"], tools, strict=True)]
    finally:
        process.terminate()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def _ask(url: str, model: str, talk: list[dict], tools: list[dict] | None, more: dict) -> dict:
    content = {"model": model, "messages": talk, "temperature": 0, "max_tokens": LONGEST}
    if tools:
        content |= {"tools": tools, **more}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["choices"][0]["message"]
    except urllib.error.HTTPError as error:
        return {"content": f"error {error.code}: {error.read().decode()[:300]}"}


if __name__ == "__main__":
    client, task, answers = sys.argv[1:]
    found = globals()[client](json.loads(Path(task).read_text()))
    Path(answers).write_text(json.dumps(found))
