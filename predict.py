"""Answer with a trained model: one sample, a chat in the terminal, or a whole file.

    python predict.py --mode glm3 --model_path output-glm3/epoch-2-step-750-merged --predict_path data/spo_1.json
    python predict.py --mode glm3 --model_path ... --instruction "..." --input "..."
    python predict.py --mode glm3 --model_path ...            (chat; an empty line ends it)

The folder may be a full model, a P-Tuning result, or a LoRA adapter: which, it finds out by itself.
"""

import contextlib
import os
import sys

from tuning import exits
from tuning.arguments.parser import answer_early
from tuning.arguments.predict import longest_prompt, parse_args
from tuning.environment import let_segments_grow

if __name__ == "__main__":
    exits.start_script()
    answer_early(parse_args)
    let_segments_grow()

import torch
from tqdm import tqdm

from glm_models.generation import generate_answers
from glm_models.tokenization import Prompt
from tuning.engine.loading import choose_dtype, load_result, load_tokenizer, named_device
from tuning.errors import DataError, UserError
from tuning.evaluate.answers import AnswerFile, Made, describe_model, file_hash
from tuning.exits import clear_errors
from tuning.lora.adapter import find_base
from tuning.metrics import (
    AS_WRITTEN,
    describe,
    describe_outputs,
    kind_of,
    label_scores,
    missing,
    references_of,
    relation_scores,
    score,
    with_references,
)
from tuning.samples.dialogue import Dialogue
from tuning.samples.findings import FIRST, lines_text
from tuning.samples.formats import KEYS, to_dialogue, unused_keys
from tuning.samples.row_files import read_rows
from tuning.terminal import visible
from utils import quiet, set_seed

PARTS = {"triples": relation_scores, "classes": label_scores}  # scores of each relation, of each label
CHUNK = 1000  # rows whose prompts are held at once to count cuts


@torch.inference_mode()
def answer(model, tokenizer, questions: list[Dialogue], args) -> list[tuple[str, bool]]:
    """Answers to a batch of questions, each with whether it ended by itself.

    A row's answer does not depend on the rows beside it: --max_length is counted for each row without its padding.
    """
    prompts = [prompt.ids.tolist() for prompt in encode(tokenizer, questions, args.max_src_len)]
    sampling = {}
    if args.do_sample:
        sampling = {"do_sample": True, "top_p": args.top_p, "temperature": args.temperature}
    options = {"repetition_penalty": args.repetition_penalty, "num_beams": args.num_beams, **sampling}
    limits = [max(1, args.max_length - len(prompt)) for prompt in prompts]
    return generate_answers(model, tokenizer, prompts, limits, **options)


def predict_file(args) -> None:
    """Answer all rows of --predict_path into --output_path, JSON lines; go on where an earlier run stopped.

    All that can be refused is refused before the model is loaded, which takes minutes.
    """
    numbered = list(read_rows(args.predict_path, several_outputs=True, empty_outputs=True, missing_outputs=True))
    if unused := unused_keys((row for _, row in numbered), KEYS | {AS_WRITTEN, "prediction", "ended"}):
        print(f"{args.predict_path}: {unused}")
    base = find_base(args.model_path, args.ori_model_dir)
    tokenizer = load_tokenizer(args.mode, base)
    lines = [line for line, _ in numbered]
    rows = [with_references(row, tokenizer) if "output" in row else row for _, row in numbered]
    with AnswerFile(args.output_path, rows, describe_run(args, len(rows), base, tokenizer), args.overwrite) as file:
        warn_of_cuts(tokenizer, rows, lines, args.max_src_len)
        if file.done:
            print(f"{args.output_path} holds {len(file.done)} of {len(rows)} answers; going on from there")
        if len(file.done) < len(rows):
            answer_rows(file, args)
        done = file.done

    unended = sum(not row["ended"] for row in done)
    print(f"answers: {args.output_path}" + (f" ({unended} cut at --max_length {args.max_length})" if unended else ""))
    references = [references_of(row) if "output" in row else [] for row in rows]
    show_scores(args.metrics, [row["prediction"] for row in done], references, [row["ended"] for row in done])


def answer_rows(file: AnswerFile, args) -> None:
    """Load the model and answer the rows that have no answer yet."""
    tokenizer, model = load_result(args.mode, args.model_path, args.ori_model_dir, args.device)
    with tqdm(total=len(file.rows), initial=len(file.done)) as bar:
        for start in range(len(file.done), len(file.rows), args.batch_size):
            part = file.rows[start : start + args.batch_size]
            set_seed(args.seed + start)  # with --do_sample: a run that goes on draws what it would have drawn
            file.add(answer(model, tokenizer, [question_in(row) for row in part], args))
            bar.update(len(part))


def question_in(row: dict) -> Dialogue:
    """What the model is asked in a row; a reference answer is no part of it."""
    dialogue = to_dialogue(row)
    return dialogue._replace(messages=dialogue.asked)


def describe_run(args, rows: int, base: str, tokenizer) -> Made:
    """All that the answers to a file depend on. --batch_size is not among it."""
    names = ["mode", "max_length", "max_src_len", "num_beams", "repetition_penalty", "do_sample"]
    names += ["top_p", "temperature", "seed"] if args.do_sample else []
    settings = {f"--{name}": getattr(args, name) for name in names}
    settings["SHA-256 of --predict_path"] = file_hash(args.predict_path)
    settings["type of numbers"] = str(choose_dtype(base, args.device)[0])
    settings |= describe_model(args.mode, args.model_path, base, tokenizer)
    return Made(settings, rows, args.model_path)


def warn_of_cuts(tokenizer, rows: list[dict], lines: list[int], max_src_len: int) -> None:
    """Say which queries lose their end to --max_src_len.

    Raises:
        UserError: the template alone is longer than that.
    """
    cut = []
    for start in range(0, len(rows), CHUNK):
        prompts = encode(tokenizer, [question_in(row) for row in rows[start : start + CHUNK]], max_src_len)
        cut += [line for line, prompt in zip(lines[start : start + CHUNK], prompts, strict=True) if prompt.cut]
    if cut:
        where = lines_text(len(cut), cut[:FIRST])
        print(f"warning: the end of the query is cut at --max_src_len {max_src_len} in {where}")


def encode(tokenizer, questions: list[Dialogue], max_src_len: int) -> list[Prompt]:
    """Prompts of some questions. Raises UserError: the template alone is longer than max_src_len."""
    try:
        return tokenizer.encode_questions(questions, max_src_len)
    except ValueError as error:
        raise UserError(f"--max_src_len: {error}") from None


def show_scores(kind: str, predictions: list[str], references: list[list[str]], ended: list[bool]) -> None:
    """Print the scores that fit the references, or those of the kind that --metrics names.

    Args:
        references: of each row; an empty list for a row without any, which is not scored.
    """
    known, count = [i for i, answers in enumerate(references) if answers], len(references)
    references = [references[i] for i in known]
    nothing = not any(text.strip() for answers in references for text in answers)
    if not known or (kind == "auto" and nothing):
        why = "every output is empty" if known else "the file has no references (output)"
        print(f"no scores: {why}; {describe_outputs(predictions, ended)}")
        return
    if len(known) < count:
        print(f"scored: the {len(known)} of {count} rows that have references (output)")
    predictions, ended = [predictions[i] for i in known], [ended[i] for i in known]
    kind = kind_of(references) if kind == "auto" else kind
    *lines, outputs = describe(kind, score(kind, predictions, references, ended))
    line = (
        "  {}: precision {precision:.4f} recall {recall:.4f} F1 {f1:.4f} ({expected} expected, {predicted} predicted)"
    )
    table = PARTS[kind](predictions, references) if kind in PARTS else {}
    lines += [line.format(name, **row) for name, row in table.items() if row["expected"]]
    if kind == "classes" and (others := len(predictions) - sum(row["predicted"] for row in table.values())):
        lines.append(f"  {others} of {len(predictions)} answers are none of these labels")
    if missing(kind):
        lines.append(f"ROUGE and BLEU are left out; they need: {missing(kind)}")
    print(*lines, outputs, sep="\n")


def chat(model, tokenizer, args) -> None:
    """Talk in the terminal, answers shown as they come. Ctrl-C stops an answer; where a question is asked, the chat."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then edits a line by characters, not by bytes
    if hasattr(sys.stdin, "reconfigure"):  # before the first read: later it is refused
        sys.stdin.reconfigure(errors="surrogateescape")  # else half a character ends the chat
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
        replies = model.stream_chat(tokenizer, query, history, max_length=args.max_length, **sampling)
        for response, history in replies:
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
        if args.predict_path:
            predict_file(args)
            return
        set_seed(args.seed)
        tokenizer, model = load_result(args.mode, args.model_path, args.ori_model_dir, args.device)
        if args.instruction or args.input:
            question = question_in({"instruction": args.instruction, "input": args.input})
            if encode(tokenizer, [question], args.max_src_len)[0].cut:
                print(f"warning: the query's end is cut at --max_src_len {args.max_src_len}", file=sys.stderr)
            print(answer(model, tokenizer, [question], args)[0][0])
        else:
            chat(model, tokenizer, args)


if __name__ == "__main__":
    main()
