"""Plain text: cut into blocks without loss, learnt whole as a plain computation says, and trained beside other rows."""

import csv
import gzip
import json
import random

import numpy as np
import pytest
import torch
from conftest import TEXT
from runs import Launched, allow_bf16, command, make_base, read_losses, result_bytes, write_bf16_file

import data_set
from glm_models import MODE
from tuning.arguments.train import parse_args
from tuning.errors import DataError
from tuning.samples.check import check_data
from tuning.samples.dataset import DataSettings, InstructionData, split_rows
from tuning.samples.dialogue import Dialogue
from tuning.samples.encoding import IGNORE_INDEX, encode_samples
from tuning.samples.epochs import Packs, pack_rows, plan_epoch
from tuning.samples.formats import to_dialogue
from tuning.samples.row_files import read_rows
from tuning.samples.text import FIRST_BLOCK, LATER_BLOCK

ROW = {"instruction": "抽取故障：", "input": "水泵漏水。", "output": "水泵_部件故障_漏水"}
LONG = "\n".join(TEXT)
ODD = [
    "[gMASK]<sop> <|user|></s>",
    "  两个  空格\t\n\n",
    "🚗 ｆｕｌｌ ＷＩＤＴＨ，",
    "<n><eop>sop",
    "a" * 70,
    "漏",
    "é\u200b",
]


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows, name="rows.json") -> str:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    return write_rows


def text_dialogue(text: str) -> Dialogue:
    return to_dialogue({"text": text})


def prefix_of(tokenizer) -> list[int]:
    names = ("[gMASK]", "<sop>") if tokenizer.mode == "glm" else ("[gMASK]", "sop")
    return [tokenizer.convert_tokens_to_ids(name) for name in names]


# Blocks


@pytest.mark.parametrize("mode", MODE)
def test_no_token_of_a_text_is_lost_or_doubled(tokenizers, mode):
    tokenizer, chance = tokenizers[mode], random.Random(5)
    prefix = prefix_of(tokenizer)
    texts = ["".join(chance.choice(TEXT + ODD) for _ in range(chance.randrange(1, 9))) for _ in range(60)]
    dialogues = [text_dialogue(text) for text in texts]
    dialogues[7:7] = [to_dialogue(ROW)]
    for max_len in (4, 5, 40, *(chance.randrange(41, 400) for _ in range(6))):
        # the other row has no room in the shortest
        some = [one for one in dialogues if one.is_text] if max_len < 40 else dialogues
        samples = encode_samples(tokenizer, some, max_len, max_len - 10)
        assert samples.places.tolist() == sorted(samples.places.tolist())
        blocks: dict[int, list] = {}
        for place, sample in zip(samples.places.tolist(), samples, strict=True):
            blocks.setdefault(place, []).append(sample)
        assert blocks.keys() == {*range(len(some))}
        for place, dialogue in enumerate(some):
            mine = blocks[place]
            if not dialogue.is_text:
                assert mine == [encode_samples(tokenizer, [dialogue], max_len, max_len - 10)[0]]
                continue
            whole = [*tokenizer.encode_text(dialogue.prompt), tokenizer.eos_token_id]
            assert [token for one in mine for token in one.input_ids[2:]] == whole
            assert all(one.input_ids[:2] == prefix and one.spans == ((2, len(one.input_ids)),) for one in mine)
            assert all(one.labels == [IGNORE_INDEX] * 2 + one.input_ids[2:] for one in mine)
            assert not any(one.prompt_cut or one.answer_cut for one in mine)
            sizes = [len(one.input_ids) for one in mine]
            assert sizes[:-2] == [max_len] * (len(sizes) - 2) and max(sizes) <= max_len
            # the end token is learnt after a token of the text
            assert sizes[-1] >= min(4, len(whole) + 2) and sizes[-2:-1] in ([], [max_len], [max_len - 1])
    with pytest.raises(ValueError, match="max_len 3 is too small for plain text: a block has at least 4 tokens"):
        encode_samples(tokenizer, [text_dialogue("水泵漏水")], 3, 2)


@pytest.mark.parametrize("mode", ["glm2", "glm3"])
def test_a_short_text_is_what_the_tokenizer_makes_of_it(tokenizers, mode):
    tokenizer = tokenizers[mode]
    sample = encode_samples(tokenizer, [text_dialogue(TEXT[9])], 300, 10)[0]
    assert sample.input_ids == [*tokenizer(TEXT[9])["input_ids"], tokenizer.eos_token_id]


def test_marks_tell_where_a_text_begins(tokenizers, write):
    path = write({"text": LONG}, ROW, {"text": "短"}, {"text": LONG, "id": 3})
    data = InstructionData(DataSettings(path, 200, 100), tokenizers["glm3"])
    blocks = (len(data) - 2) // 2
    one = [FIRST_BLOCK] + [LATER_BLOCK] * (blocks - 1)
    assert blocks > 3 and data.texts.tolist() == [*one, 0, FIRST_BLOCK, *one]
    assert data.lines.tolist() == [1] * blocks + [2, 3] + [4] * blocks
    said = (
        f"; {2 * blocks + 1} of them are blocks of plain text, from 3 rows; warning: repeats of an earlier row: 1 row"
    )
    assert said in data.summary() and data.summary().endswith("keys not used: id (1 row)")
    skipping = InstructionData(DataSettings(path, 200, 100, skip_cut=True), tokenizers["glm3"])
    assert len(skipping) == len(data) and not skipping.skipped


def test_instruction_rows_are_the_same_beside_texts(tokenizers, write):
    rows = [ROW | {"input": line} for line in TEXT[:40]]
    alone = InstructionData(DataSettings(write(*rows, name="alone.json"), 60, 40), tokenizers["glm"])
    mixed = [row for pair in zip(rows, ({"text": line} for line in TEXT[:40]), strict=True) for row in pair]
    both = InstructionData(DataSettings(write(*mixed), 60, 40), tokenizers["glm"])
    there = np.flatnonzero(both.texts == 0)
    assert [both.samples[i] for i in there] == list(alone.samples)
    assert (both.lines[there] == 2 * alone.lines - 1).all()


# Loss


@pytest.mark.parametrize("mode", MODE)
def test_loss_is_that_of_a_plain_computation(load, tokenizers, write, mode):
    """Packed with other rows, against each piece of the text alone, put together here."""
    tokenizer, model, max_len = tokenizers[mode], load(mode), 150
    texts = [LONG[:900], TEXT[12], TEXT[20] + "\n" + TEXT[21]]
    data = InstructionData(DataSettings(write(*({"text": text} for text in texts)), max_len, 10), tokenizer)
    total, count = 0.0, 0
    for text in texts:
        ids = [*tokenizer.encode_text(text), tokenizer.eos_token_id]
        for start in range(0, len(ids), max_len - 2):
            piece = ids[start : start + max_len - 2]
            with torch.no_grad():
                logits = model(torch.tensor([prefix_of(tokenizer) + piece])).logits[0, 1:-1].double()
            total -= torch.log_softmax(logits, 1)[torch.arange(len(piece)), piece].sum().item()
            count += len(piece)
    assert len(data) >= 5 and count == data.answer_lengths.sum()  # no end token stood alone in a piece
    for packs in (pack_rows(data, max_len, 1), Packs(np.arange(len(data)))):
        plan = plan_epoch(data, packs, data_set.BatchShape(2, 2), 1, 1)
        model.train()
        step_losses, learnt = [], []
        for step in plan:
            batches = [data[micro_batch] for micro_batch in step]
            with torch.no_grad():
                step_losses.append(sum(model(**batch.to("cpu")).loss.item() for batch in batches) / 2)
            learnt.append(sum(data.answer_tokens(batch.rows) for batch in batches))
        assert sum(learnt) == count
        mean = sum(loss * tokens for loss, tokens in zip(step_losses, learnt, strict=True)) / count
        assert mean == pytest.approx(total / count, rel=1e-5)


# Rows


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": " \n"}, "text is empty"),
        ({"text": ["a"]}, "text must be a string of plain text, not a list"),
        ({"text": None}, "text must be a string of plain text, not null"),
        ({"text": "水\ud83d"}, "unpaired surrogate"),
        ({"Text": "水"}, "the key 'Text' must be written 'text'"),
        ({"text": "水", "label": 1}, "a row of classification (text, label)"),
        ({"text": "水", "Summary": "漏"}, "plain text has no answer, but this one has the key 'Summary' too"),
        (
            {"text": "水", "messages": [{"role": "user", "content": "水"}]},
            "mixes two formats: OpenAI messages, and text",
        ),
        ({"text": "水", "tools": [{"name": "get_weather"}]}, "the key 'tools' holds tools, which would be lost"),
        ({"text": "水", "meta": {"weight": 0.5}}, "a weight for the loss"),
        ({"text": "水", "input": "漏"}, "plain text ('text') and 'input' in one row: "),
        ({"text": "水", "output": "漏", "input": ""}, "plain text ('text') and 'input', 'output' in one row: "),
        ({"text": "水", "instruction": "漏"}, "plain text ('text') and 'instruction' in one row: "),
    ],
)
def test_what_is_wrong_with_a_text(write, tokenizers, row, problem):
    path = write({"text": "水泵", "id": 1, "summary": ""}, row)
    with pytest.raises(DataError) as error:
        InstructionData(DataSettings(path, 200, 100), tokenizers["glm2"])
    assert str(error.value).startswith(f"{path} line 2: ") and problem in str(error.value)
    assert str(error.value).isprintable()


def test_a_text_is_no_question(write):
    with pytest.raises(
        DataError, match=r"line 1: a row of plain text \(text\): it asks nothing; it is for --train_path"
    ):
        list(read_rows(write({"text": "水泵"}), missing_outputs=True))


def test_the_blocks_of_a_text_are_on_one_side(tokenizers, write):
    rows = [{"text": "".join(TEXT[i : i + 6])} for i in range(40)] + [ROW | {"input": line} for line in TEXT[:30]]
    data = InstructionData(DataSettings(write(*rows), 60, 40), tokenizers["glm3"])
    held = split_rows(data, 0.3)[1]
    lines = {*data.lines[held].tolist()}
    assert held.tolist() == np.flatnonzero(np.isin(data.lines, [*lines])).tolist()
    assert 5 < len({line for line in lines if line <= 40}) < 20 and any(line > 40 for line in lines)
    other = InstructionData(DataSettings(write(*rows[:10:-1], *rows[:5]), 60, 40), tokenizers["glm3"])
    moved = {line: 70 - line + 1 for line in range(12, 71)} | {line: 59 + line for line in range(1, 6)}
    assert {*other.lines[split_rows(other, 0.3)[1]].tolist()} == {moved[line] for line in lines if line in moved}


def test_check_data_counts_texts_apart(tokenizers, write, tmp_path):
    path, said = write({"text": LONG}, ROW, {"text": "短"}), []
    check_data([DataSettings(path, 200, 100)], tokenizers["glm"], None, str(tmp_path), said.append)
    data = InstructionData(DataSettings(path, 200, 100), tokenizers["glm"])
    blocks = data.lengths[data.texts > 0]
    line = f"plain text: 2 rows in {len(blocks)} blocks of at most --max_len 200, {blocks.sum()} tokens; none is cut"
    assert any(one.startswith("formats:") and "plain text" in one for one in said)
    assert line in said and f"{path}: 3 rows, 3 of them usable" in said
    assert any(one.startswith(f"tokens: {data.lengths[data.texts == 0].sum()} (prompts ") for one in said)
    said = []
    check_data([DataSettings(write({"text": LONG}), 200, 100)], tokenizers["glm"], None, str(tmp_path), said.append)
    assert not any(one.startswith("tokens: ") for one in said)


def test_answers_to_text_alone_are_refused(tiny, tokenizers, write, monkeypatch):
    for name in ("once_per_node", "on_rank_0"):
        monkeypatch.setattr(data_set, name, lambda function: function())
    for name in ("is_rank_0", "print_rank_0"):
        monkeypatch.setattr(data_set, name, lambda *text: False)
    path = write(*({"text": line} for line in TEXT[:8]))
    flags = ["--mode", "glm3", "--model_name_or_path", tiny["glm3"], "--train_path", path, "--data_cache", "none"]
    args = parse_args([*flags, "--eval_path", path, "--eval_generate", "auto"])
    with pytest.raises(DataError, match=r"--eval_generate: the rows of .* are all plain text, which has no answers"):
        data_set.load_sources(args, tokenizers["glm3"])


# Training


def conversation(question: str) -> list[dict]:
    """Two turns, as the OpenAI API has them."""
    texts = (("user", "你好"), ("assistant", "你好！"), ("user", question), ("assistant", ROW["output"]))
    return [{"role": role, "content": text} for role, text in texts]


@pytest.mark.parametrize(("mode", "method", "stage"), [("glm", "all", 2), ("glm3", "lora", 3)])
def test_texts_train_on_two_ranks_and_go_on_from_a_state(tmp_path, mode, method, stage):
    """Texts, conversations and a table with a weight, packed, with replay of text and answers to what asks."""
    rows, table, general = tmp_path / "rows.json", tmp_path / "table.csv.gz", tmp_path / "general.json"
    some = [
        {"text": LONG[:1500]},
        *({"text": line} for line in TEXT[:12]),
        *(ROW | {"input": line, "history": [["你好", "你好！"]]} for line in TEXT[12:16]),
        *({"messages": conversation(line)} for line in TEXT[16:20]),
    ]
    rows.write_text("\n".join(map(json.dumps, some)))
    general.write_text("\n".join(json.dumps({"text": line}) for line in TEXT[20:40]))
    with gzip.open(table, "wt", encoding="gb18030", newline="") as file:
        csv.writer(file).writerows([[*ROW], *((ROW | {"input": line}).values() for line in TEXT[:12])])
    base, output = make_base(mode, tmp_path / "base"), tmp_path / "output"
    argv = command(mode, method, stage, True, base, rows, output)
    ds_file = write_bf16_file(stage, tmp_path / "ds.json")
    more = f"""--train_path {rows} {table}:1.5
        --ds_file {ds_file} --replay_path {general} --replay_ratio 0.2 --eval_ratio 0.4
        --eval_generate text --eval_max_new_tokens 4 --num_train_epochs 2"""
    found = []
    for number, flags in enumerate(([], ["--resume_from_checkpoint", str(output / "states/step-00000002")])):
        losses, log = tmp_path / f"losses{number}", tmp_path / f"log{number}"
        run = Launched([*argv, *more.split(), *flags], 2, losses, log, allow_bf16)
        assert run.wait() == {0: 0, 1: 0}, log.read_text()[-3000:]
        found.append((read_losses(losses), result_bytes(output), log.read_text()))
    (whole, results, said), (resumed, resumed_results, _) = found
    assert len(whole) > 3 and resumed == whole[2:] and resumed_results == results
    assert "of them are blocks of plain text, from 13 rows" in said and "blocks of plain text, from 20 rows" in said
    assert f"{table}: a CSV table, gzip, GB18030 text" in said and f"{table} x 1.5" in said
    assert " blocks of plain text" in said[said.index("validation: ") :].splitlines()[0]
    answered = (output / "validation-predictions.jsonl").read_text().splitlines()
    assert answered and all(json.loads(line).keys() & {"instruction", "messages"} for line in answered)
