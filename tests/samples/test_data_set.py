"""data_set.py: which files are refused and with what words, which ids are learnt, how rows are dealt out to ranks; and,
with GLM_GOLDEN_DIR set, the samples and batches of the reference, each deliberate difference named.
"""

import json
import os

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from glm_models import MODE
from tuning.errors import DataError
from tuning.samples.batches import MicroBatch, collate
from tuning.samples.dataset import DataSettings, InstructionData
from tuning.samples.encoding import IGNORE_INDEX, Sample, encode_sample
from tuning.samples.epochs import BatchShape, Packs, pack_rows, plan_epoch
from tuning.samples.row_files import read_rows

GOOD = {"instruction": "抽取故障：", "input": "水泵漏水。", "output": "水泵_部件故障_漏水"}
modes = pytest.mark.parametrize("mode", MODE)


@pytest.fixture
def write(tmp_path):
    def write(text, name="rows.json"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def line(**change):
    row = {**GOOD, **change}
    return json.dumps({key: value for key, value in row.items() if value != "gone"}, ensure_ascii=False) + "\n"


def test_lines_and_arrays_are_read_with_their_line_numbers(write):
    lines = line() + "\n" + line(input="另一行\u2028还是这一行") + "\n\n"
    assert [number for number, _ in read_rows(write(lines))] == [1, 3]
    array = "[\n" + line().strip() + ",\n\n" + json.dumps(GOOD, indent=2) + "\n]\n"
    assert list(read_rows(write(array))) == [(2, GOOD), (4, GOOD)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line() + "{broken\n", "line 2: not valid JSON"),
        (line() + line(output="gone"), "line 2: the key 'output' is missing"),
        (line(output=["a"]), "line 1: output must be a string, not a list"),
        (line(output=None), "line 1: output must be a string, not null"),
        (line(output="  "), "line 1: output is empty"),
        (line(input=3), "line 1: input must be a string, not a number"),
        (line(instruction="", input=" "), "line 1: instruction and input are both empty"),
        ("3\n", "line 1: a row must be an object"),
        ("\n\n", "holds no rows"),
        ("", "holds no rows"),
        ("[" + line().strip() + " " + line().strip() + "]", "line 1: expected a comma or ]"),
        ("[" + line().strip(), "line 1: expected a comma or ]"),
        ("[" + line().strip() + ",]", "line 1: not valid JSON"),
        (line().encode() + b'{"instruction": "\xff"}\n', "line 2: not UTF-8 text"),
        ("[" + line().strip() + "]]", "line 1: there is more after the end"),
        ("[" * 100_000, "not valid JSON"),
        (line(instruction="gone"), "line 1: the key 'instruction' is missing"),
    ],
)
def test_a_broken_file_is_one_clear_error(write, text, message):
    path = write(text)
    with pytest.raises(DataError) as error:
        list(read_rows(path))
    assert path in str(error.value)
    assert message in str(error.value)


@modes
def test_an_empty_output_can_be_an_answer(tiny, mode, write):
    tokenizer = MODE[mode].tokenizer.from_pretrained(tiny[mode])
    path = write(line() + line(output=""))
    data = InstructionData(DataSettings(path, 120, 60, empty_outputs=True), tokenizer)
    *answer, end = data.samples[1].learnt
    assert end == tokenizer.eos_token_id
    assert tokenizer.decode_answer(answer) == ""
    with pytest.raises(DataError, match="line 2: output is empty; --allow_empty_output"):
        InstructionData(DataSettings(path, 120, 60), tokenizer)


def test_several_references_are_for_predictions_only(write):
    path = write(line(output=["一", "二"]))
    assert next(read_rows(path, several_outputs=True))[1]["output"] == ["一", "二"]
    with pytest.raises(DataError):
        list(read_rows(path))


@modes
def test_exactly_the_answer_and_its_end_are_learnt(tiny, mode):
    tokenizer = MODE[mode].tokenizer.from_pretrained(tiny[mode])
    sample = encode_sample(tokenizer, GOOD, 100, 80)
    prompt = tokenizer.encode_prompt(GOOD["instruction"] + GOOD["input"])
    assert sample.prompt == prompt
    learnt = [label for label in sample.labels if label != IGNORE_INDEX]
    assert learnt[-1] == tokenizer.eos_token_id
    assert tokenizer.decode_answer(learnt[:-1]) == GOOD["output"]
    assert sample.labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
    assert not sample.prompt_cut
    assert not sample.answer_cut


@modes
def test_a_cut_answer_has_no_end_token(tiny, mode):
    tokenizer = MODE[mode].tokenizer.from_pretrained(tiny[mode])
    whole = encode_sample(tokenizer, GOOD, 100, 80)
    cut = encode_sample(tokenizer, GOOD, len(whole.input_ids) - 1, 80)
    assert cut.input_ids == whole.input_ids[:-1]
    assert cut.answer_cut
    exact = encode_sample(tokenizer, GOOD, len(whole.input_ids), 80)
    assert exact == whole


@modes
def test_limits_are_reported_and_impossible_ones_refused(tiny, mode, write):
    tokenizer = MODE[mode].tokenizer.from_pretrained(tiny[mode])
    path = write(line() + line(input="很长的一段文字，" * 20) + line(output="很长的答案，" * 30))
    data = InstructionData(DataSettings(path, 120, 60), tokenizer)
    assert (data.prompts_cut, data.answers_cut) == (1, 1)
    skipping = InstructionData(DataSettings(path, 120, 60, skip_cut=True), tokenizer)
    assert (len(skipping), skipping.skipped, skipping.lines.tolist()) == (1, 2, [1])
    prompt = len(encode_sample(tokenizer, GOOD, 100, 80).prompt)
    with pytest.raises(DataError, match=r"rows\.json line 1: the prompt's \d+ tokens leave no room"):
        InstructionData(DataSettings(path, prompt, 60), tokenizer)


class Rows:
    """Stands for InstructionData where only lengths matter."""

    def __init__(self, count):
        self.lengths = 3 + np.arange(count) * 5 % 17
        self.answer_lengths = self.lengths - 1 - np.arange(count) % 2

    def __len__(self):
        return len(self.lengths)

    length = InstructionData.length
    tokens = InstructionData.tokens
    answer_tokens = InstructionData.answer_tokens


def singly(data):
    return Packs(np.arange(len(data)))


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("split", [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (3, 2, 4)])
@pytest.mark.parametrize("count", [1, 4, 10, 23])
def test_every_row_is_dealt_once_and_all_ranks_get_as_many_batches(split, count, by_length):
    data = Rows(count)
    shape = BatchShape(*split)
    for epoch in (1, 2):
        steps = plan_epoch(data, singly(data), shape, seed=1, epoch=epoch, by_length=by_length)
        assert len(steps) == shape.count_steps(count)
        dealt = [row for step in steps for micro_batch in step if not micro_batch.is_filler for row in micro_batch.rows]
        assert sorted(dealt) == list(range(count))
        for step in steps:
            assert len(step) == shape.accumulation * shape.data_parallel
            real = [row for micro_batch in step if not micro_batch.is_filler for row in micro_batch.rows]
            assert all(1 <= len(micro_batch.rows) <= shape.rows for micro_batch in step)
            for micro_batch in step:
                assert micro_batch.num_items * len(step) == pytest.approx(data.answer_tokens(real))


def test_the_order_is_new_each_epoch_and_the_same_for_a_seed():
    data = Rows(30)

    def plan(*split_seed_epoch):
        *split, seed, epoch = split_seed_epoch
        return list(plan_epoch(data, singly(data), BatchShape(*split), seed, epoch))

    plans = {key: plan(2, 2, 1, *key) for key in [(1, 1), (1, 2), (2, 1), (2, 2)]}
    assert plans[1, 1] == plan(2, 2, 1, 1, 1)
    assert plans[1, 1] != plans[1, 2] != plans[2, 2]
    # a step is one set of rows, however it is split
    for one, other in zip(plans[1, 2], plan(4, 1, 1, 1, 2), strict=True):
        assert sorted(row for m in one for row in m.rows) == sorted(row for m in other for row in m.rows)


@pytest.mark.parametrize("by_length", [False, True])
def test_the_largest_batch_comes_first(by_length):
    data = Rows(40)
    steps = plan_epoch(data, singly(data), BatchShape(2, 2), seed=1, epoch=1, by_length=by_length)
    assert data.tokens(steps[0][0].rows) == max(data.tokens(m.rows) for step in steps for m in step)
    assert sorted(steps[0][0].rows) == sorted(sorted(range(40), key=data.length)[-2:])


def test_steps_by_length_differ_little_within():
    data = Rows(400)

    def spread(by_length):
        steps = plan_epoch(data, singly(data), BatchShape(2, 2), seed=1, epoch=2, by_length=by_length)
        lengths = [[data.length(row) for m in step for row in m.rows] for step in steps]
        return sum(max(step) - min(step) for step in lengths)

    assert spread(True) < spread(False) / 5


@pytest.mark.parametrize("max_len", [20, 50, 333])
def test_packs_hold_every_row_once_and_are_nearly_full(max_len):
    data = Rows(500)
    packs = pack_rows(data, max_len, seed=1)
    assert sorted(row for pack in packs for row in pack) == list(range(500))
    assert max(map(data.tokens, packs)) <= max_len
    assert len(packs) <= 1.05 * data.tokens(range(500)) / max_len + 1
    assert list(packs) != list(pack_rows(data, max_len, seed=2))
    steps = plan_epoch(data, packs, BatchShape(1, 2, 2), seed=1, epoch=1)
    assert len(steps) == BatchShape(1, 2, 2).count_steps(len(packs))
    assert sorted(row for step in steps for m in step if not m.is_filler for row in m.rows) == list(range(500))


def test_a_batch_is_its_samples_end_to_end():
    samples = [Sample([5, 6, 7], ((1, 3),), False, False), Sample([8, 9, 5, 4], ((3, 4),), False, False)]
    batch = collate(samples, lambda ids: ids.index(5), MicroBatch([0, 1], 2.0))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 5, 4]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, -100, 4]]
    assert batch["answer_positions"].tolist() == [1, 2, 6]
    assert batch["segments"] == [(3, 0), (4, 2)]
    assert (batch.tokens, batch.samples) == (7, 2)


def test_a_filler_batch_teaches_nothing():
    batch = collate([Sample([5, 6, 7], ((1, 3),), False, False)], len, MicroBatch([0], 2.0, is_filler=True))
    assert batch["labels"].unique().tolist() == [IGNORE_INDEX]
    assert len(batch["answer_positions"]) == 0
    assert (batch.tokens, batch.samples) == (0, 0)


@modes
def test_the_context_is_what_the_model_takes_for_it(tiny, mode):
    tokenizer = MODE[mode].tokenizer.from_pretrained(tiny[mode])
    sample = encode_sample(tokenizer, GOOD, 100, 80)
    expected = len(sample.prompt) - 1 if mode == "glm" else 0
    assert tokenizer.context_length(sample.input_ids) == expected
    if mode == "glm":
        model = MODE[mode].model(MODE[mode].config.from_pretrained(tiny[mode], num_layers=1))
        assert model.transformer.context_lengths(torch.tensor([sample.input_ids])).tolist() == [expected]


golden = pytest.mark.skipif("GLM_GOLDEN_DIR" not in os.environ, reason="GLM_GOLDEN_DIR is not set")


def golden_sample(mode, tokenizer, row, max_len, max_src_len):
    """Our sample; for ChatGLM-6B with the reference's own prompt, which its official chat does not use."""
    if mode != "glm":
        return encode_sample(tokenizer, row, max_len, max_src_len)
    texts = ("[Round 1]\n问：", row["instruction"] + row["input"], "\n答：")
    before, query, after = map(tokenizer._to_pieces_text, texts)
    (fitted,) = tokenizer._fit_queries([(before, after)], [query], max_src_len, threads=1)
    prompt = [*fitted[0].tolist(), tokenizer.gmask_token_id, tokenizer.bos_token_id]
    answer = [*tokenizer.encode_answer(row["output"]), tokenizer.eos_token_id]
    room = max_len - len(prompt)
    ids = prompt + answer[:room]
    return Sample(ids, ((len(prompt), len(ids)),), False, len(answer) > room)


@golden
@modes
def test_samples_equal_the_references(mode):
    """Deliberate differences: a cut answer carries no end token, and for ChatGLM3 three more of its tokens (where the
    reference reserves six places, three are needed); ChatGLM-6B does not learn `<sop>`, nor ChatGLM3 `<|assistant|>`;
    a prompt's template is never cut, so a max_src_len below its length is refused; ChatGLM-6B's prompt is its chat's.
    """
    folder = os.path.join(os.environ["GLM_GOLDEN_DIR"], mode)
    tokenizer = MODE[mode].tokenizer.from_pretrained(os.path.join(folder, "checkpoint"))
    with open(os.path.join(folder, "dataset.json"), encoding="utf-8") as file:
        content = json.load(file)
    compared = refused = 0
    for setting in content["settings"]:
        for item in setting["items"]:
            row = content["samples"][item["sample"]]
            try:
                sample = golden_sample(mode, tokenizer, row, setting["max_len"], setting["max_src_len"])
            except ValueError as error:
                assert "template" in str(error)
                refused += 1
                continue
            expected, labels = item["input_ids"], item["labels"]
            if item["target_truncated"]:
                assert sample.input_ids[: len(expected) - 1] == expected[:-1]
                # the three places that the reference wastes may hold all that it cut
                assert sample.answer_cut or mode == "glm3"
                continue
            assert sample.input_ids == expected
            start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
            assert len(sample.prompt) == start + (mode != "glm2")
            assert sample.labels[len(sample.prompt) :] == labels[len(sample.prompt) :]
            compared += 1
    assert compared > 30
    assert refused <= 15


def learnt_span(labels: list[int]) -> tuple[int, int]:
    """First labelled position, and the position after the last."""
    learnt = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
    return learnt[0], learnt[-1] + 1


@golden
@modes
def test_batches_equal_the_references(mode):
    with open(os.path.join(os.environ["GLM_GOLDEN_DIR"], mode, "dataset.json"), encoding="utf-8") as file:
        content = json.load(file)
    for batch in content["collator"]:
        by_sample = {item["sample"]: item for item in content["settings"][batch["setting"]]["items"]}
        items = [by_sample[i] for i in batch["items"]]
        items = (
            items if None not in items else [content["settings"][batch["setting"]]["items"][i] for i in batch["items"]]
        )
        samples = [Sample(item["input_ids"], (learnt_span(item["labels"]),), False, False) for item in items]
        ours = collate(samples, len, MicroBatch([], 1.0))
        lengths = [tokens for tokens, _ in ours["segments"]]
        for name, padding in (("input_ids", batch["pad_token_id"]), ("labels", IGNORE_INDEX)):
            rows = ours[name][0].split(lengths)  # the reference's batches are padded on the right
            padded = pad_sequence(rows, batch_first=True, padding_value=padding)
            assert torch.equal(padded, torch.tensor(batch[name]))
