"""Answer with a trained model: one sample, a chat in the terminal, or a whole file.

    python predict.py --mode glm3 --model_path output-glm3/epoch-2-step-750-merged --predict_path data/spo_1.json
    python predict.py --mode glm3 --model_path ... --instruction "..." --input "..."
    python predict.py --mode glm3 --model_path ...            (chat; an empty line ends it)

The folder may be a full model, a P-Tuning result, or a LoRA adapter: which, it finds out by itself.
"""

import json
import os

from arguments import answer_early
from predict_arguments import longest_prompt, parse_args

if __name__ == "__main__":
    answer_early(parse_args)

import torch
from tqdm import tqdm

from data_set import DataError, read_rows
from formats import KEYS, unused_keys
from glm_models.chat import generate_answers
from metrics import AS_WRITTEN, describe, kind_of, missing, references_of, relation_scores, score, with_references
from utils import UserError, clear_errors, load_result, named_device, quiet, set_seed


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
    if unused := unused_keys((row for _, row in rows), KEYS | {AS_WRITTEN, "prediction", "ended"}):
        print(f"{args.predict_path}: {unused}")
    done = read_done(args.output_path, rows)
    if done:
        print(f"{args.output_path} holds {len(done)} of {len(rows)} answers; going on from there")
    with open(args.output_path, "a", encoding="utf-8") as file, tqdm(total=len(rows), initial=len(done)) as bar:
        for start in range(len(done), len(rows), args.batch_size):
            part = [row for _, row in rows[start : start + args.batch_size]]
            answers = answer(model, tokenizer, [row["instruction"] + row["input"] for row in part], args)
            for row, (text, ended) in zip(part, answers, strict=True):
                done.append({**with_references(row, tokenizer), "prediction": text, "ended": ended})
                file.write(json.dumps(done[-1], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(part))

    references = [references_of(with_references(row, tokenizer)) for _, row in rows]
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
    """Talk in the terminal, answers shown as they come."""
    print("An empty line ends the chat, /new begins another.")
    history = None
    while True:
        try:
            query = input("> ")
        except EOFError:
            return
        if not query.strip():
            return
        if query.strip() == "/new":
            history = None
            continue
        shown = ""
        sampling = {"do_sample": args.do_sample, "top_p": args.top_p, "temperature": args.temperature}
        try:
            for response, new_history in model.stream_chat(  # noqa: B007
                tokenizer, query, history, max_length=args.max_length, **sampling
            ):
                text = response if isinstance(response, str) else json.dumps(response, ensure_ascii=False)
                if not text.startswith(shown):  # the clean-up changed what was already on the screen
                    print()
                    shown = ""
                print(text[len(shown) :], end="", flush=True)
                shown = text
        except ValueError as error:  # the conversation is longer than max_length
            print(f"error: {error}; /new begins another conversation")
            continue
        print()
        history = new_history


def check_args(args) -> None:
    """Resolve --device and fill in the defaults that depend on other flags."""
    args.max_src_len = longest_prompt(args)
    if args.predict_path:
        name = os.path.splitext(os.path.basename(args.predict_path))[0]
        args.output_path = args.output_path or os.path.join(args.model_path, f"predictions-{name}.jsonl")
    args.device = named_device(args.device)


def main(argv=None) -> None:
    with clear_errors(DataError):
        args = parse_args(argv)
        quiet(args.verbose)
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
