"""Answer with a trained model: one sample, a chat in the terminal, or a whole file.

    python predict.py --mode glm3 --model_path output-glm3/epoch-2-step-750-merged --predict_path data/spo_1.json
    python predict.py --mode glm3 --model_path ... --instruction "..." --input "..."
    python predict.py --mode glm3 --model_path ...            (chat; an empty line ends it)

The folder may be a full model, a P-Tuning result, or a LoRA adapter: which, it finds out by itself.
"""

import argparse
import contextlib
import json
import os
import sys

import exits

if __name__ == "__main__":
    exits.start_script()

import torch
from tqdm import tqdm

from data_set import DataError, read_rows
from errors import UserError
from exits import clear_errors, visible
from glm_models import MODE
from glm_models.chat import generate_answers
from metrics import HEADLINE, describe, kind_of, missing, references_of, relation_scores, score
from utils import load_result, named_device, quiet, set_seed, true_or_false


@torch.inference_mode()
def answer(model, tokenizer, queries: list[str], args) -> list[tuple[str, bool]]:
    """Answers to a batch of queries, each with whether it ended by itself.

    A row's answer does not depend on the rows beside it: --max_length is counted for each row without its padding.
    """
    try:
        prompts = [tokenizer.encode_prompt(query, max_src_len=args.max_src_len) for query in queries]
    except ValueError as error:
        raise UserError(f"--max_src_len: {error}") from None
    sampling = {}
    if args.do_sample:
        sampling = {"do_sample": True, "top_p": args.top_p, "temperature": args.temperature}
    options = {"repetition_penalty": args.repetition_penalty, "num_beams": args.num_beams, **sampling}
    limits = [max(1, args.max_length - len(prompt)) for prompt in prompts]
    return generate_answers(model, tokenizer, prompts, limits, **options)


def predict_file(model, tokenizer, args) -> None:
    """Answer all rows of --predict_path into --output_path, JSON lines; go on where an earlier run stopped."""
    rows = list(read_rows(args.predict_path, several_outputs=True, empty_outputs=True))
    done = read_done(args.output_path, rows)
    if done:
        print(f"{args.output_path} holds {len(done)} of {len(rows)} answers; going on from there")
    with open(args.output_path, "a", encoding="utf-8") as file, tqdm(total=len(rows), initial=len(done)) as bar:
        for start in range(len(done), len(rows), args.batch_size):
            part = [row for _, row in rows[start : start + args.batch_size]]
            answers = answer(model, tokenizer, [row["instruction"] + row["input"] for row in part], args)
            for row, (text, ended) in zip(part, answers, strict=True):
                done.append({**row, "prediction": text, "ended": ended})
                file.write(json.dumps(done[-1], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(part))

    references = [references_of(row) for _, row in rows]
    unended = sum(not row["ended"] for row in done)
    print(f"answers: {args.output_path}" + (f" ({unended} cut at --max_length {args.max_length})" if unended else ""))
    show_scores(args.metrics, [row["prediction"] for row in done], references, [row["ended"] for row in done])


def show_scores(kind: str, predictions: list[str], references: list[list[str]], ended: list[bool]) -> None:
    """Print the scores that fit the references, or those of the kind that --metrics names."""
    kind = kind_of(references) if kind == "auto" else kind
    *lines, outputs = describe(kind, score(kind, predictions, references, ended))
    if kind == "triples":
        for relation, row in relation_scores(predictions, references).items():
            if row["expected"]:
                line = "  {}: precision {precision:.4f} recall {recall:.4f} F1 {f1:.4f} ({expected} expected)"
                lines.append(line.format(relation, **row))
    if missing(kind):
        lines.append(f"ROUGE and BLEU are left out; they need: {missing(kind)}")
    print(*lines, outputs, sep="\n")


def read_done(path: str, rows: list[tuple[int, dict]]) -> list[dict]:
    """Answers that an earlier run wrote for the same rows; a half-written last line is taken off the file.

    Raises:
        UserError: the file holds something else.
    """
    if not os.path.exists(path):
        return []
    done, good = [], 0
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if row is None or not line.endswith(b"\n"):
                break
            asked = rows[len(done)][1] if len(done) < len(rows) else {}
            same = all(row.get(key) == asked.get(key) for key in ("instruction", "input", "output"))
            if not same or not isinstance(row.get("prediction"), str):
                raise UserError(
                    f"{path} exists and is not an earlier run's answers to this file; remove it or name another"
                )
            done.append(row)
            good += len(line)
    os.truncate(path, good)
    return done


def chat(model, tokenizer, args) -> None:
    """Talk in the terminal, answers shown as they come. Ctrl-C stops an answer; where a question is asked, the chat."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then edits a line by characters, not by bytes
    print("An empty line ends the chat, /new begins another, Ctrl-C stops an answer.")
    history = None
    while query := ask():
        if query == "/new":
            history = None
            continue
        used = len(tokenizer.encode_prompt(query, history))
        if used >= args.max_length:
            print(f"the conversation has {used} tokens, --max_length is {args.max_length}; /new begins another")
            continue
        history = show_answer(model, tokenizer, query, history, args)


def ask() -> str:
    """What is typed at the prompt; "" at its end, and for Ctrl-C."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # else half a character ends the chat
    while True:
        try:
            query = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return ""
        try:
            query.encode()
            return query
        except UnicodeEncodeError:
            print(f"not {sys.stdin.encoding} text, perhaps half a character that was erased; please type it again")


def show_answer(model, tokenizer, query: str, history, args):
    """Print an answer as it comes. Returns the history with it, or with the part of it that came before Ctrl-C."""
    shown = ""
    sampling = {"do_sample": args.do_sample, "top_p": args.top_p, "temperature": args.temperature}
    try:
        for response, history in model.stream_chat(tokenizer, query, history, max_length=args.max_length, **sampling):
            text = response
            if not isinstance(response, str):  # ChatGLM3 calls a tool: its name, and what it is given
                text = f"{history[-1]['metadata'].strip()}\n{history[-1]['content']}"
            if not text.startswith(shown):  # the clean-up changed what was already on the screen
                print()
                shown = ""
            print(visible(text[len(shown) :]), end="", flush=True)
            shown = text
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    return history


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODE, required=True, help="model family")
    parser.add_argument("--model_path", required=True, help="folder of a model, a P-Tuning result or a LoRA adapter")
    parser.add_argument("--ori_model_dir", help="base model of an adapter (default: the one its config names)")
    parser.add_argument("--device", help="as cuda, cuda:1 or cpu, or a number (default: the accelerator, else cpu)")
    group = parser.add_argument_group("what to answer (default: chat in the terminal)")
    group.add_argument("--predict_path", help="file of instruction, input, output (a string or several references)")
    group.add_argument(
        "--output_path", help="where its answers go (default: predictions-NAME.jsonl in the model folder)"
    )
    group.add_argument("--batch_size", type=int, default=8, help="rows at a time")
    group.add_argument(
        "--metrics", choices=["auto", *HEADLINE], default="auto", help="how to score them (default: by the references)"
    )
    group.add_argument("--instruction", default="", help="one sample: its instruction")
    group.add_argument("--input", default="", help="one sample: its input")
    group = parser.add_argument_group("generation")
    group.add_argument("--max_length", type=int, default=2048, help="most tokens of prompt and answer together")
    group.add_argument(
        "--max_src_len", type=int, help="most tokens of a prompt, as in training (default: max_length - 16)"
    )
    flag = {"type": true_or_false, "nargs": "?", "const": True, "default": False, "metavar": "True|False"}
    group.add_argument("--do_sample", **flag, help="draw tokens at random instead of taking the likeliest")
    group.add_argument("--top_p", type=float, default=0.8, help="with --do_sample: draw from this share of probability")
    group.add_argument(
        "--temperature", type=float, default=0.8, help="with --do_sample: above 1 flatter, below sharper"
    )
    group.add_argument("--num_beams", type=int, default=1, help="beam search")
    group.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 discourages repetition")
    group.add_argument("--seed", type=int, default=1234, help="with --do_sample")
    group.add_argument("--verbose", **flag, help="show what the libraries have to say")
    return parser.parse_args(argv)


def check_args(args) -> None:
    wrong = []
    if args.predict_path and (args.instruction or args.input):
        wrong.append("--predict_path and --instruction or --input exclude each other")
    if args.max_src_len is None:
        args.max_src_len = args.max_length - 16
    if not 0 < args.max_src_len < args.max_length - 3:
        wrong.append(f"--max_src_len {args.max_src_len} must be above 0 and well below --max_length {args.max_length}")
    for name in ("batch_size", "num_beams"):
        if getattr(args, name) < 1:
            wrong.append(f"--{name} must be at least 1")
    if args.temperature <= 0 or not 0 < args.top_p <= 1 or args.repetition_penalty <= 0:
        wrong.append("--temperature and --repetition_penalty must be above 0, --top_p above 0 and at most 1")
    if missing(args.metrics):
        wrong.append(f"--metrics {args.metrics} needs more packages: {missing(args.metrics)}")
    if args.predict_path:
        if not os.path.isfile(args.predict_path):
            wrong.append(f"--predict_path {args.predict_path}: no such file")
        name = os.path.splitext(os.path.basename(args.predict_path))[0]
        args.output_path = args.output_path or os.path.join(args.model_path, f"predictions-{name}.jsonl")
    try:
        args.device = named_device(args.device)
    except UserError as error:
        wrong.append(str(error))
    if wrong:
        raise UserError("\n       ".join(wrong))


def main(argv=None) -> None:
    args = parse_args(argv)
    quiet(args.verbose)
    with clear_errors(DataError):
        check_args(args)
        set_seed(args.seed)
        tokenizer, model = load_result(args.mode, args.model_path, args.ori_model_dir, args.device)
        if args.predict_path:
            predict_file(model, tokenizer, args)
        elif args.instruction or args.input:
            print(answer(model, tokenizer, [args.instruction + args.input], args)[0][0])
        else:
            chat(model, tokenizer, args)


if __name__ == "__main__":
    main()
