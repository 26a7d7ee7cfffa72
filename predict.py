"""Answer with a trained model: one sample, a chat in the terminal, or a whole file.

    python predict.py --mode glm3 --model_path output-glm3/epoch-2-step-750-merged --predict_path data/spo_1.json
    python predict.py --mode glm3 --model_path ... --instruction "..." --input "..."
    python predict.py --mode glm3 --model_path ...            (chat; an empty line ends it)

The folder may be a full model, a P-Tuning result or a LoRA adapter; predict.py detects which.
"""

import contextlib
import io
import json
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
from glm_models.tools import TOOLS_SYSTEM, ToolCallError, answer_text, read_answer
from tuning.engine.loading import choose_dtype, load_result, load_tokenizer, named_device, prediction_bits
from tuning.errors import DataError, UserError
from tuning.evaluate.answers import AnswerFile, Made, describe_model, describe_scores, file_hash
from tuning.exits import exit_on_user_errors
from tuning.lora.adapter import find_base
from tuning.metrics import ADDED, AS_WRITTEN, references_of, with_references
from tuning.samples.dialogue import Dialogue
from tuning.samples.findings import FIRST, lines_text
from tuning.samples.formats import KEYS, Columns, to_dialogue, unused_keys
from tuning.samples.row_files import describe_file, read_rows
from tuning.terminal import visible
from utils import set_seed, silence_libraries

OBSERVATION = "/observation"  # what a tool returned, typed in the chat
CHUNK = 1000  # rows per batch when counting prompts that are cut


@torch.inference_mode()
def answer(model, tokenizer, questions: list[Dialogue], args) -> list[tuple[str, bool]]:
    """Answers to a batch of questions, each with whether it ended by itself.

    The answer to a row does not depend on the rest of the batch: --max_length counts the tokens of each row, without
    padding.
    """
    prompts = [prompt.ids.tolist() for prompt in encode(tokenizer, questions, args.max_src_len)]
    sampling = {}
    if args.do_sample:
        sampling = {"do_sample": True, "top_p": args.top_p, "temperature": args.temperature}
    options = {"repetition_penalty": args.repetition_penalty, "num_beams": args.num_beams, **sampling}
    most = args.max_new_tokens or args.max_length
    limits = [min(most, max(1, args.max_length - len(prompt))) for prompt in prompts]
    return generate_answers(model, tokenizer, prompts, limits, **options)


def predict_file(args) -> None:
    """Answer all rows of --predict_path into --output_path (JSON lines); continue where an earlier run stopped.

    All input is checked before the model is loaded, which takes minutes.
    """
    columns = Columns.of(args)
    how = {"several_outputs": True, "empty_outputs": True, "missing_outputs": True}
    numbered = list(read_rows(args.predict_path, **how, columns=columns))
    for line in describe_file(args.predict_path, columns):
        print(line)
    if unused := unused_keys((row for _, row in numbered), KEYS | ADDED | {AS_WRITTEN}):
        print(f"{args.predict_path}: {unused}")
    base = find_base(args.model_path, args.ori_model_dir)
    tokenizer = load_tokenizer(args.mode, base)
    lines = [line for line, _ in numbered]
    rows = [with_references(row, tokenizer) if "output" in row else row for _, row in numbered]
    with AnswerFile(args.output_path, rows, describe_run(args, len(rows), base, tokenizer), args.overwrite) as file:
        warn_of_cuts(tokenizer, args.predict_path, lines, rows, args.max_src_len)
        if file.done:
            print(f"{args.output_path} holds {len(file.done)} of {len(rows)} answers; continuing from there")
        if len(file.done) < len(rows):
            answer_rows(file, args)
        done = file.done

    limit = f"--max_length {args.max_length}"
    limit += f" or --max_new_tokens {args.max_new_tokens}" if args.max_new_tokens else ""
    unended = sum(not row["ended"] for row in done)
    print(f"answers: {args.output_path}" + (f" ({unended} cut at {limit})" if unended else ""))
    references = [references_of(row) if "output" in row else [] for row in rows]
    predictions, ended = [row["prediction"] for row in done], [row["ended"] for row in done]
    print(*describe_scores(args.metrics, predictions, references, ended), sep="\n")


def load_model(args):
    """Tokenizer and model that the flags name."""
    bits = args.quantization_bit
    return load_result(args.mode, args.model_path, args.ori_model_dir, args.device, bits=bits)


def answer_rows(file: AnswerFile, args) -> None:
    """Load the model and answer the rows that have no answer yet."""
    tokenizer, model = load_model(args)
    with tqdm(total=len(file.rows), initial=len(file.done)) as bar:
        for start in range(len(file.done), len(file.rows), args.batch_size):
            part = file.rows[start : start + args.batch_size]
            set_seed(args.seed + start)  # with --do_sample, a continued run draws the same samples
            file.add(answer(model, tokenizer, [question_in(row) for row in part], args))
            bar.update(len(part))


def question_in(row: dict) -> Dialogue:
    """What the model is asked in a row; a reference answer is no part of it."""
    dialogue = to_dialogue(row)
    return dialogue._replace(messages=dialogue.asked)


def describe_run(args, rows: int, base: str, tokenizer) -> Made:
    """Everything that the answers to a file depend on; --batch_size is not part of it."""
    names = ["mode", "max_length", "max_src_len", "num_beams", "repetition_penalty", "do_sample"]
    names += ["top_p", "temperature", "seed"] if args.do_sample else []
    names += [f"{name}_column" for name in Columns._fields] if args.prompt_column else []
    names += ["max_new_tokens"] if args.max_new_tokens else []
    settings = {f"--{name}": getattr(args, name) for name in names}
    settings["SHA-256 of --predict_path"] = file_hash(args.predict_path)
    settings["type of numbers"] = str(choose_dtype(base, args.device)[0])
    if bits := prediction_bits(args.model_path, args.quantization_bit)[0]:
        settings["bits of the linear layers"] = bits
    settings |= describe_model(args.mode, args.model_path, base, tokenizer)
    return Made(settings, rows, args.model_path)


def warn_of_cuts(tokenizer, path: str, lines: list[int], rows: list[dict], max_src_len: int) -> None:
    """Warn about conversations that lose turns, and queries that are cut, at --max_src_len.

    Raises:
        UserError: a row's messages are not for this model family, or cannot be cut to fit; names its line.
    """
    cut, shortened = [], []
    for start in range(0, len(rows), CHUNK):
        some = lines[start : start + CHUNK]
        questions = [question_in(row) for row in rows[start : start + CHUNK]]
        for line, question in zip(some, questions, strict=True):
            if problem := tokenizer.dialogue_problem(question):
                raise DataError(f"{path} line {line}: {problem}")
        try:
            prompts = encode(tokenizer, questions, max_src_len)
        except UserError:
            for line, question in zip(some, questions, strict=True):
                with naming_line(f"{path} line {line}"):
                    encode(tokenizer, [question], max_src_len)
            raise
        shortened += [line for line, prompt in zip(some, prompts, strict=True) if prompt.dropped]
        cut += [line for line, prompt in zip(some, prompts, strict=True) if prompt.cut]
    if shortened:
        where = lines_text(len(shortened), shortened[:FIRST])
        print(f"warning: conversations lose turns from their beginning to --max_src_len {max_src_len} in {where}")
    if cut:
        where = lines_text(len(cut), cut[:FIRST])
        print(f"warning: the end of the query is cut at --max_src_len {max_src_len} in {where}")


@contextlib.contextmanager
def naming_line(where: str):
    """Errors of a row, with its place before them."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def encode(tokenizer, questions: list[Dialogue], max_src_len: int) -> list[Prompt]:
    """Prompts of some questions. Raises UserError if the prompt template alone is longer than max_src_len."""
    try:
        return tokenizer.encode_questions(questions, max_src_len)
    except ValueError as error:
        raise UserError(f"--max_src_len: {error}") from None


def chat(model, tokenizer, args) -> None:
    """Chat in the terminal, with streamed answers. Ctrl-C stops an answer, or at the prompt the chat."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - makes input() edit characters, not bytes
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # only possible before the first read
        sys.stdin.reconfigure(errors="surrogateescape")  # an incomplete character must not end the chat
    print("An empty line ends the chat, /new begins another, Ctrl-C stops an answer.")
    history = start = opening(args)
    while query := ask():
        if query == "/new":
            history = start
            continue
        role = {}  # the family's own for questions
        if query.split()[0] == OBSERVATION:
            if not waiting_call(history):
                print(f"{OBSERVATION} TEXT is what a tool returned; the model has not called one")
                continue
            role, query = {"role": "observation"}, query.removeprefix(OBSERVATION).strip()
        used = len(tokenizer.encode_prompt(query, history, **role))
        if used >= args.max_length:
            print(f"the conversation has {used} tokens, --max_length is {args.max_length}; /new begins another")
            continue
        history = show_answer(model, tokenizer, query, history, args, **role)


def opening(args) -> list[dict] | None:
    """The history with which a conversation begins: --system and --tools, in ChatGLM3's form."""
    if not args.system and args.tools is None:
        return None
    message = {"role": "system", "content": args.system or TOOLS_SYSTEM}
    return [message if args.tools is None else message | {"tools": args.tools}]


def waiting_call(history) -> str:
    """The name of the tool that the last message calls, "" if it calls none (no other family than ChatGLM3 does)."""
    last = history[-1] if history else None
    return last.get("metadata", "").strip() if isinstance(last, dict) else ""


def describe_call(history) -> str:
    """What the user is told of a call in the last message; "" if there is none."""
    if not (name := waiting_call(history)):
        return ""
    try:
        call = read_answer(answer_text(name, history[-1]["content"]))
    except ToolCallError as error:
        return f"[a call of {name} that cannot be read: {error}]"
    if call is None:
        return ""
    parameters = json.dumps(call.parameters, ensure_ascii=False)
    return f"[calls {name} with {parameters}; answer with {OBSERVATION} and what the tool returns]"


def ask() -> str:
    """Read a line from the terminal; "" at the end of input and for Ctrl-C."""
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
            print(f"not valid {sys.stdin.encoding} text, perhaps a half-erased character; please type it again")


def show_answer(model, tokenizer, query: str, history, args, **role):
    """Stream an answer to the terminal. Returns the history with the answer, or with its part before Ctrl-C."""
    shown = ""
    sampling = {"do_sample": args.do_sample, "top_p": args.top_p, "temperature": args.temperature}
    try:
        replies = model.stream_chat(tokenizer, query, history, max_length=args.max_length, **role, **sampling)
        for response, history in replies:
            text = response
            if not isinstance(response, str):  # ChatGLM3 calls a tool: name and arguments
                text = f"{history[-1]['metadata'].strip()}\n{history[-1]['content']}"
            if not text.startswith(shown):  # post-processing changed text that is already on the screen
                print()
                shown = ""
            print(visible(text[len(shown) :]), end="", flush=True)
            shown = text
        print()
        if told := describe_call(history):
            print(visible(told))
    except KeyboardInterrupt:
        print(" [stopped]")
    return history


def read_tools(path: str) -> list[dict]:
    """The tools that a file describes. Raises UserError if it is not a JSON list of objects."""
    try:
        with open(path, encoding="utf-8") as file:
            tools = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--tools {path}: {error}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"--tools {path}: it must hold a list of objects, one a tool, as under `tools` in training")
    return tools


def check_args(args) -> None:
    """Resolve --device, read --tools, and set the defaults that depend on other flags."""
    args.tools = read_tools(args.tools) if args.tools else None
    args.max_src_len = longest_prompt(args)
    if args.predict_path:
        name = os.path.splitext(os.path.basename(args.predict_path))[0]
        args.output_path = args.output_path or os.path.join(args.model_path, f"predictions-{name}.jsonl")
    args.device = named_device(args.device)


def main(argv=None) -> None:
    with exit_on_user_errors():
        args = parse_args(argv)
        silence_libraries(args.verbose)
        check_args(args)
        if args.predict_path:
            predict_file(args)
            return
        set_seed(args.seed)
        tokenizer, model = load_model(args)
        if args.instruction or args.input:
            question = question_in({"instruction": args.instruction, "input": args.input})
            if encode(tokenizer, [question], args.max_src_len)[0].cut:
                print(f"warning: the end of the query is cut at --max_src_len {args.max_src_len}", file=sys.stderr)
            print(answer(model, tokenizer, [question], args)[0][0])
        else:
            chat(model, tokenizer, args)


if __name__ == "__main__":
    main()
