"""Answer with a trained model: one sample, a chat in the terminal, or a whole file.

    python predict.py --mode glm3 --model_path output-glm3/epoch-2-step-750-merged --predict_path data/spo_1.json
    deepspeed predict.py --mode glm3 --model_path ... --predict_path ...     (on all GPUs)
    python predict.py --mode glm3 --model_path ... --instruction "..." --input "..."
    python predict.py --mode glm3 --model_path ...            (chat; an empty line ends it)

The folder may be a full model, a P-Tuning result or a LoRA adapter; predict.py detects which.
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Set

from tuning import exits
from tuning.arguments.parser import answer_early
from tuning.arguments.predict import longest_prompt, parse_args, processes
from tuning.environment import let_segments_grow

if __name__ == "__main__":
    exits.start_script()
    answer_early(parse_args)
    let_segments_grow()

import torch
from tqdm import tqdm

from glm_models.convert.direct import side_folder
from glm_models.generation import generate_answers
from glm_models.prefix import folder_of
from glm_models.refill import Request, generate_in_slots
from glm_models.tokenization import Prompt
from glm_models.tools import TOOLS_SYSTEM, ToolCallError, answer_text, read_answer
from tuning.engine import patches
from tuning.engine.loading import choose_dtype, load_result, load_tokenizer, named_device, prediction_bits
from tuning.errors import DataError, UserError
from tuning.evaluate.answers import AnswerFile, Made, describe_model, describe_scores, file_hash
from tuning.evaluate.parts import Part, share_parts
from tuning.evaluate.work import GROUP_TOKENS, Work, plan_groups
from tuning.exits import exit_on_user_errors
from tuning.hub import find_models
from tuning.lora.adapter import find_base
from tuning.metrics import ADDED, AS_WRITTEN, references_of, with_references
from tuning.run.health import PeerWatchdog
from tuning.run.launch import leaving_distributed, start_distributed, telling_others
from tuning.run.nodes import check_settings, check_start, first_here
from tuning.run.record import describe_versions
from tuning.samples.dialogue import Dialogue
from tuning.samples.findings import FIRST, lines_text
from tuning.samples.formats import KEYS, Columns, to_dialogue, unused_keys
from tuning.samples.row_files import describe_file, read_rows, read_tools
from tuning.terminal import visible
from utils import control_group, is_rank_0, on_rank_0, once_per_node, print_rank_0, set_seed, silence_libraries

OBSERVATION = "/observation"  # what a tool returned, typed in the chat
CHUNK = 1000  # rows per batch when counting prompts that are cut


@torch.inference_mode()
def answer(model, tokenizer, questions: list[Dialogue], args) -> list[tuple[str, bool]]:
    """Answers to a batch of questions, each with whether it ended by itself; the batch waits for its longest answer."""
    prompts = encode_ids(tokenizer, questions, args)
    limits = [answer_limit(prompt, args) for prompt in prompts]
    return generate_answers(model, tokenizer, prompts, limits, num_beams=args.num_beams, **options_of(args))


def answer_groups(model, tokenizer, rows: list[dict], groups: Iterable[list[int]], answered: Set[int], args):
    """Answer groups of rows, at most --batch_size rows at a time; rows that have finished make room for the next.

    The answer to a row does not depend on the others: it is greedy, or has random numbers of its own.

    Args:
        groups: indices of rows, see tuning.evaluate.work.
        answered: rows that have an answer already.

    Yields:
        Row, text, and whether the answer ended by itself, in the order in which they end.
    """
    if args.num_beams > 1:
        for group in groups:
            set_seed(args.seed + group[0])
            texts = answer(model, tokenizer, [question_in(rows[row]) for row in group], args)
            yield from ((row, *text) for row, text in zip(group, texts, strict=True) if row not in answered)
        return

    def requests(group: list[int]) -> list[Request]:
        prompts = encode_ids(tokenizer, [question_in(rows[row]) for row in group], args)
        limits = [0 if row in answered else answer_limit(ids, args) for row, ids in zip(group, prompts, strict=True)]
        return [Request(row, ids, n, args.seed + row) for row, ids, n in zip(group, prompts, limits, strict=True)]

    slots = min(args.batch_size, len(rows))
    for row, ids, ended in generate_in_slots(model, tokenizer, map(requests, groups), slots, **options_of(args)):
        yield row, tokenizer.decode_answer(ids), ended


def options_of(args) -> dict:
    """The flags that say how tokens are chosen, as arguments of `generate`."""
    options = {"repetition_penalty": args.repetition_penalty}
    if args.do_sample:
        options |= {"do_sample": True, "top_p": args.top_p, "temperature": args.temperature}
    return options


def encode_ids(tokenizer, questions: list[Dialogue], args) -> list[list[int]]:
    """The ids of the prompts of some questions."""
    return [prompt.ids.tolist() for prompt in encode(tokenizer, questions, args.max_src_len)]


def answer_limit(prompt: list[int], args) -> int:
    """Maximum tokens of the answer to a prompt: --max_length counts both."""
    return min(args.max_new_tokens or args.max_length, max(1, args.max_length - len(prompt)))


def predict_file(args) -> None:
    """Answer all rows of --predict_path into --output_path (JSON lines); continue where an earlier run stopped.

    Called on every rank. All input is checked before the model is loaded, which takes minutes.
    """
    columns = Columns.of(args)
    how = {"several_outputs": True, "empty_outputs": True, "missing_outputs": True}
    numbered = list(read_rows(args.predict_path, **how, columns=columns))
    for line in describe_file(args.predict_path, columns):
        print_rank_0(line)
    if unused := unused_keys((row for _, row in numbered), KEYS | ADDED | {AS_WRITTEN}):
        print_rank_0(f"{args.predict_path}: {unused}")
    base = find_base(args.model_path, args.ori_model_dir)
    tokenizer = load_tokenizer(args.mode, side_folder(base))
    lines = [line for line, _ in numbered]
    rows = [with_references(row, tokenizer) if "output" in row else row for _, row in numbered]
    with contextlib.ExitStack() as files:
        opened = []  # on rank 0 the answer file

        def take_over() -> set[int]:
            opened.append(files.enter_context(AnswerFile(args.output_path, rows, made, args.overwrite)))
            return set(opened[0].answers)  # the texts would go to all ranks

        shared = share_parts(args.output_path)
        made = once_per_node(lambda: describe_run(args, len(rows), base, tokenizer))
        check_settings(made.settings, args)
        known = on_rank_0(take_over)
        lengths = warn_of_cuts(tokenizer, args.predict_path, lines, rows, args.max_src_len)
        if known:
            print_rank_0(f"{args.output_path} holds {len(known)} of {len(rows)} answers; continuing from there")
        more = answer_rows(rows, lengths, known, args, shared) if len(known) < len(rows) else {}
        for file in opened:
            file.finish(more)
            show_scores(rows, file.answers, args)


def show_scores(rows: list[dict], answers: dict[int, tuple[str, bool]], args) -> None:
    """Print where the answers are, and their scores."""
    predictions, ended = zip(*(answers[row] for row in range(len(rows))), strict=True)
    limit = f"--max_length {args.max_length}"
    limit += f" or --max_new_tokens {args.max_new_tokens}" if args.max_new_tokens else ""
    unended = ended.count(False)
    print(f"answers: {args.output_path}" + (f" ({unended} cut at {limit})" if unended else ""))
    references = [references_of(row) if "output" in row else [] for row in rows]
    print(*describe_scores(args.metrics, list(predictions), references, list(ended)), sep="\n")


def load_model(args):
    """Tokenizer and model that the flags name."""
    bits = args.quantization_bit
    return load_result(args.mode, args.model_path, args.ori_model_dir, args.device, bits=bits)


def answer_rows(
    rows: list[dict], lengths: list[int], known: Set[int], args, shared: bool
) -> dict[int, tuple[str, bool]]:
    """Load the model and answer the rows that have no answer yet, on all ranks.

    Args:
        lengths: tokens of each row's prompt.
        known: rows that have an answer.
        shared: whether all nodes see the folder of the answer file.

    Returns:
        On rank 0 the answers by row: text, and whether it ended by itself.
    """
    tokenizer, model = load_model(args)
    groups = plan_groups(lengths, args.batch_size, None if args.num_beams > 1 else GROUP_TOKENS)
    work, mine, rank = Work(groups, known), {}, int(os.environ.get("RANK", 0))
    with (
        Part(args.output_path, rank, temporary=not shared and first_here() > 0) as part,
        tqdm(total=len(rows), initial=len(known), disable=rank > 0) as bar,
    ):
        for row, text, ended in answer_groups(model, tokenizer, rows, work.take(), known, args):
            part.add(row, text, ended)
            mine[row] = text, ended
            bar.update(len(known) + work.count(1) - bar.n)
        for _ in until_all_are_here():
            bar.update(len(known) + work.count() - bar.n)
    return gather(mine)


def until_all_are_here() -> Iterator[None]:
    """Yields now and then until all ranks have come here; a rank that has died meanwhile is an error."""
    if torch.distributed.is_initialized():
        here = torch.distributed.barrier(control_group(), async_op=True)
        while not here.is_completed():
            time.sleep(0.1)
            yield
        here.wait()
        yield


def gather(answers: dict) -> dict:
    """On rank 0 the answers of all ranks."""
    if not torch.distributed.is_initialized():
        return answers
    everyone = [None] * torch.distributed.get_world_size() if is_rank_0() else None
    torch.distributed.gather_object(answers, everyone, group=control_group())
    return {row: one for part in everyone or [] for row, one in part.items()}


def question_in(row: dict) -> Dialogue:
    """What the model is asked in a row; a reference answer is no part of it."""
    dialogue = to_dialogue(row)
    return dialogue._replace(messages=dialogue.asked)


def describe_run(args, rows: int, base: str, tokenizer) -> Made:
    """Everything that the answers to a file depend on; --batch_size is part of it with sampled beams alone."""
    names = ["mode", "max_length", "max_src_len", "num_beams", "repetition_penalty", "do_sample"]
    names += ["top_p", "temperature", "seed"] if args.do_sample else []
    names += [f"{name}_column" for name in Columns._fields] if args.prompt_column else []
    names += ["max_new_tokens"] if args.max_new_tokens else []
    settings = {f"--{name}": getattr(args, name) for name in names}
    if args.do_sample:
        settings["random numbers"] = "by row" if args.num_beams == 1 else f"by groups of {args.batch_size}"
    settings["SHA-256 of --predict_path"] = file_hash(args.predict_path)
    settings["type of numbers"] = str(choose_dtype(base, args.device)[0])
    if bits := prediction_bits(args.model_path, args.quantization_bit)[0]:
        settings["bits of the linear layers"] = bits
    settings |= describe_model(args.mode, args.model_path, base, tokenizer)
    return Made(settings, rows, args.model_path)


def warn_of_cuts(tokenizer, path: str, lines: list[int], rows: list[dict], max_src_len: int) -> list[int]:
    """Warn about conversations that lose turns, and queries that are cut, at --max_src_len.

    Returns:
        Tokens of each row's prompt.

    Raises:
        UserError: a row's messages are not for this model family, or cannot be cut to fit; names its line.
    """
    cut, shortened, lengths = [], [], []
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
        lengths += [len(prompt.ids) for prompt in prompts]
        shortened += [line for line, prompt in zip(some, prompts, strict=True) if prompt.dropped]
        cut += [line for line, prompt in zip(some, prompts, strict=True) if prompt.cut]
    if shortened:
        where = lines_text(len(shortened), shortened[:FIRST])
        print_rank_0(
            f"warning: conversations lose turns from their beginning to --max_src_len {max_src_len} in {where}"
        )
    if cut:
        where = lines_text(len(cut), cut[:FIRST])
        print_rank_0(f"warning: the end of the query is cut at --max_src_len {max_src_len} in {where}")
    return lengths


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


def check_args(args) -> None:
    """Resolve --device, read --tools, and set the defaults that depend on other flags."""
    named = args.model_path
    find_models(args, "model_path", "ori_model_dir")
    if args.ori_model_dir and find_base(args.model_path, args.ori_model_dir) == args.model_path:
        raise UserError(f"--ori_model_dir does nothing for {args.model_path}, which is a complete model: leave it out")
    args.tools = read_tools(args.tools) if args.tools else None
    args.max_src_len = longest_prompt(args)
    if args.predict_path:
        name = os.path.splitext(os.path.basename(args.predict_path))[0]
        place = folder_of(args.model_path) if named == args.model_path else ""  # not in the cache of a hub
        args.output_path = args.output_path or os.path.join(place, f"predictions-{name}.jsonl")
    args.device = named_device(args.device)


@contextlib.contextmanager
def all_ranks(args):
    """Join the other processes that a launcher has started; if one of them dies, this one ends too."""
    if processes() == 1:
        yield
        return
    patches.apply()
    with leaving_distributed():
        start_distributed(args.verbose, args.local_rank)
        watchdog = PeerWatchdog()
        check_start(args, describe_versions(), own=())
        yield
        watchdog.close()


def main(argv=None) -> None:
    with exit_on_user_errors():
        with telling_others():
            args = parse_args(argv)
        silence_libraries(args.verbose)
        with all_ranks(args):
            check_args(args)
            if args.predict_path:
                predict_file(args)
                return
            set_seed(args.seed)
            tokenizer, model = load_model(args)
            if args.instruction or args.input:
                answer_one(model, tokenizer, args)
            else:
                chat(model, tokenizer, args)


def answer_one(model, tokenizer, args) -> None:
    """Answer --instruction and --input."""
    question = question_in({"instruction": args.instruction, "input": args.input})
    if encode(tokenizer, [question], args.max_src_len)[0].cut:
        print(f"warning: the end of the query is cut at --max_src_len {args.max_src_len}", file=sys.stderr)
    print(answer(model, tokenizer, [question], args)[0][0])


if __name__ == "__main__":
    main()
