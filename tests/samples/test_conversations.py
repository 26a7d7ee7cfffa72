"""Random conversations of each format and family, against the official chats written anew (support/official_chat.py).

    python tests/samples/test_conversations.py --conversations 10000      # of each family; pytest takes some hundreds

Of each: the tokens before each learnt answer are those that the family's chat makes of the messages before it; learnt
are the answer and the token at which the chat stops, and nothing else; tool calls read back by the official parser are
what the row says; what a length limit takes away is what docs/data.md says, in training as in prediction; and samples
that stand in one packed row have the losses that they have alone.
"""

import argparse
import collections
import json
import random
import sys
import tempfile
import time
import types
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "support")]

import pytest
import torch
from conftest import TINY, make_lively_checkpoint
from official_chat import (
    answer_ids,
    counted_ids,
    cut_ids,
    drop_turns,
    prompt_ids,
    read_call,
    sample_ids,
)
from random_talks import Talk, random_talk

from glm_models import MODE
from glm_models.chat import ChatMixin
from glm_models.tools import TOOLS_SYSTEM, read_answer
from tuning.samples.batches import MicroBatch, collate
from tuning.samples.dataset import DataSettings, InstructionData
from tuning.samples.dialogue import Dialogue
from tuning.samples.encoding import Sample
from tuning.samples.formats import read_row

TOGETHER = 25  # conversations of a file
WHOLE = (10**6, 10**6)  # limits that cut nothing
BEFORE_TEXT = {"glm": 0, "glm2": 2, "glm3": 2}  # special tokens before and after what --max_src_len counts
AFTER_TEXT = {"glm": 2, "glm2": 0, "glm3": 1}
SHORTEST = 60  # --max_src_len: the template of a first question fits


class Wanted:
    """What a conversation has to become, by the official chat of a family."""

    def __init__(self, mode: str, pieces, talk: Talk):
        self.mode, self.pieces, self.talk = mode, pieces, talk
        row = json.loads(json.dumps(talk.row))
        self.dialogue = read_row(row, empty_outputs=True, train_on=talk.train_on)
        assert isinstance(self.dialogue, Dialogue), self.dialogue
        self.messages = [self.message(turn, i) for i, turn in enumerate(talk.turns)]
        self.learnt = [i for i, turn in enumerate(talk.turns) if turn.learn]
        if talk.tools is not None and self.messages[0]["role"] != "system":
            self.messages.insert(0, {"role": "system", "content": TOOLS_SYSTEM})
            self.learnt = [i + 1 for i in self.learnt]
        if talk.tools is not None:
            self.messages[0]["tools"] = talk.tools

    def message(self, turn, place: int) -> dict:
        """A message as the official chat has it. The code of a call is ours, if the official parser reads it."""
        if turn.role != "call":
            return {"role": turn.role, "content": turn.content}
        content = self.dialogue.messages[place].content
        assert same(read_call(content), turn.parameters), (content, turn.parameters)
        assert same(read_answer(f"{turn.name}\n{content}").parameters, turn.parameters)
        return {"role": "assistant", "metadata": turn.name, "content": content}

    def samples(self, max_len: int, max_src_len: int) -> list[Sample] | None:
        """All samples, None if the row cannot be used: a prompt leaves no room for its answer."""
        if self.mode == "glm3":
            return self._cut(self.messages, self.learnt, max_len, max_src_len)
        found = [self._cut(self.messages[: i + 1], [i], max_len, max_src_len) for i in self.learnt]
        return None if None in found else [one for some in found for one in some]

    def _cut(self, messages, learnt, max_len, max_src_len) -> list[Sample] | None:
        messages, learnt, gone = drop_turns(self.mode, self.pieces, messages, learnt, max_len, max_src_len)
        before = messages[: learnt[0]]
        counted, kept = (
            counted_ids(self.mode, self.pieces, before),
            cut_ids(self.mode, self.pieces, before, max_src_len),
        )
        template = counted_ids(self.mode, self.pieces, [*before[:-1], before[-1] | {"content": ""}])
        if self.mode == "glm3" and len(template) > max_src_len:
            return None
        ids, spans = prompt_ids(self.mode, self.pieces, before, kept), []
        if len(ids) >= max_len:
            return None
        if self.mode != "glm3":
            answer = answer_ids(self.mode, self.pieces, messages[-1], None)
            ids, spans = ids + answer, [(len(ids), len(ids) + len(answer))]
        else:
            shift = len(counted) - len(kept)
            for place in learnt:
                start = len(prompt_ids(self.mode, self.pieces, messages[:place])) - shift
                following = messages[place + 1] if place + 1 < len(messages) else None
                answer = answer_ids(self.mode, self.pieces, messages[place], following)
                spans.append((start, start + len(answer)))
            ids = ids + sample_ids(self.mode, self.pieces, messages)[len(ids) + shift :]
        cut = len(ids) > max_len
        spans = tuple((start, min(end, max_len)) for start, end in spans if start < max_len)
        return [Sample(ids[:max_len], spans, len(kept) < len(counted), cut, gone)]


def same(one, other) -> bool:
    """Whether two JSON values are equal, with 1, 1.0 and true apart, and -0.0 and 0.0."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def chat_prompt(mode: str, tokenizer, messages: list[dict]) -> list[int] | None:
    """What our own chat hands to the model; None where its query would have metadata, which it cannot have."""
    *history, query = messages
    if query.get("metadata") or "tools" in query:
        return None
    role = {"role": query["role"]} if mode == "glm3" else {}
    if mode != "glm3":
        texts = [message["content"] for message in history]
        history = list(zip(texts[::2], texts[1::2], strict=True))
    model = types.SimpleNamespace(device="cpu")
    return ChatMixin._inputs(model, tokenizer, query["content"], history, None, None, **role)["input_ids"][0].tolist()


def check_whole(wanted: Wanted, found: list[Sample], tokenizer) -> None:
    """Nothing is cut: each prompt is the chat's."""
    spans = [(sample, span) for sample in found for span in sample.spans]
    assert len(spans) == len(wanted.learnt)
    for (sample, (start, _)), place in zip(spans, wanted.learnt, strict=True):
        before = wanted.messages[:place]
        assert sample.input_ids[:start] == prompt_ids(wanted.mode, wanted.pieces, before)
        if (prompt := chat_prompt(wanted.mode, tokenizer, before)) is not None:
            assert sample.input_ids[:start] == prompt


def check_prediction(wanted: Wanted, tokenizer, max_src_len: int) -> None:
    """The prompt for the last message is the one that training makes before an answer there."""
    dialogue = wanted.dialogue
    question = Dialogue(dialogue.asked, dialogue.tools)
    asked = wanted.messages[: -1 if wanted.messages[-1]["role"] == "assistant" else None]
    answered = [*asked, {"role": "assistant", "content": "好"}]
    samples = wanted._cut(answered, [len(asked)], WHOLE[0], max_src_len)
    if samples is None:
        with pytest.raises(ValueError, match="max_src_len"):
            tokenizer.encode_questions([question], max_src_len)
        return
    (prompt,) = tokenizer.encode_questions([question], max_src_len)
    assert prompt.ids.tolist() == samples[0].prompt
    assert (prompt.dropped, prompt.cut) == (samples[0].dropped, samples[0].prompt_cut)


def read(path: Path, talks: list[Talk], tokenizer, limits: tuple[int, int], chance: random.Random):
    """The samples of each conversation, as training reads them from a file, and which rows were left out."""
    rows = [json.dumps(talk.row, ensure_ascii=chance.random() < 0.5) for talk in talks]
    rows = [row.replace("Infinity", "1e999") for row in rows]  # which JSON can say; no text of ours has the word
    path.write_text("\n".join(rows), encoding="utf-8")
    settings = DataSettings(str(path), *limits, empty_outputs=True, skip_bad=True, train_on=talks[0].train_on)
    data = InstructionData(settings, tokenizer)
    found = {i: [] for i in range(len(talks))}
    for line, sample in zip(data.lines.tolist(), data.samples, strict=True):
        found[line - 1].append(sample)
    return list(found.values())


class Check:
    """Checks conversations of one family.

    Args:
        folder: of a tiny checkpoint.
        work: a folder to write in.
    """

    def __init__(self, mode: str, folder: str, work: Path):
        self.mode, self.work = mode, work
        self.tokenizer = MODE[mode].tokenizer.from_pretrained(folder)
        self.model = MODE[mode].model.from_pretrained(folder).eval()
        self.counts = collections.Counter()

    def run(self, seed: str) -> None:
        """Some conversations; the seed says which."""
        chance = random.Random(seed)
        talks = [random_talk(chance, self.mode) for _ in range(TOGETHER)]
        kinds = {talk.train_on for talk in talks}
        for train_on in sorted(kinds, key=str):
            self.compare([talk for talk in talks if talk.train_on == train_on], chance)

    def compare(self, talks: list[Talk], chance: random.Random) -> None:
        pieces, path = self.tokenizer.sp_model, self.work / "rows.jsonl"
        wanted = [Wanted(self.mode, pieces, talk) for talk in talks]
        whole = read(path, talks, self.tokenizer, WHOLE, chance)
        for one, found in zip(wanted, whole, strict=True):
            samples = one.samples(*WHOLE)
            assert found == samples, (self.first_difference(found, samples), one.talk.row)
            check_whole(one, found, self.tokenizer)
        max_len = chance.choice((90, 140, 250, 400))
        limits = max_len, chance.choice((SHORTEST, max_len // 2, max_len - 20, max_len))
        expected = [one.samples(*limits) for one in wanted]
        if any(expected):
            short = read(path, talks, self.tokenizer, limits, chance)
            for one, found, samples in zip(wanted, short, expected, strict=True):
                assert found == (samples or []), (limits, self.first_difference(found, samples or []), one.talk.row)
        for one in wanted:
            check_prediction(one, self.tokenizer, limits[1])
        self.check_packed([sample for found in whole[:6] for sample in found if len(sample.input_ids) < 300][:4])
        self.count(talks, wanted, whole, expected)

    def first_difference(self, found: list[Sample], wanted: list[Sample]) -> str:
        """For a message."""
        for one, other in zip(found, wanted, strict=False):
            if one.input_ids != other.input_ids:
                return f"{self.tokenizer.decode(one.input_ids)!r} is not {self.tokenizer.decode(other.input_ids)!r}"
            if one != other:
                return f"{one[1:]} is not {other[1:]}"
        return f"{len(found)} samples, not {len(wanted)}"

    @torch.no_grad()
    def check_packed(self, samples: list[Sample]) -> None:
        """Each learnt token has the loss that it has in its sample alone."""
        if len(samples) < 2:
            return
        batch = collate(samples, self.tokenizer.context_length, MicroBatch(list(range(len(samples))), 1.0))
        logits = self.model(batch["input_ids"], segments=batch["segments"]).logits
        packed = self.losses(logits, batch["labels"])
        alone = []
        for sample in samples:
            ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
            alone.append(self.losses(self.model(ids).logits, labels))
        torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)
        self.counts["packed"] += len(samples)

    @staticmethod
    def losses(logits, labels) -> torch.Tensor:
        """Of each token that is learnt, in order."""
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none")
        return losses[labels[0, 1:] != -100]

    def count(self, talks, wanted, whole, expected) -> None:
        self.counts["conversations"] += len(talks)
        self.counts["answers"] += sum(len(one.learnt) for one in wanted)
        self.counts["calls"] += sum(turn.role == "call" for talk in talks for turn in talk.turns)
        self.counts["left out"] += expected.count(None)
        samples = [sample for some in expected for sample in some or ()]
        self.counts["shortened"] += sum(sample.dropped > 0 for sample in samples)
        self.counts["cut"] += sum(sample.prompt_cut or sample.answer_cut for sample in samples)


@pytest.mark.parametrize("mode", MODE)
def test_random_conversations_are_what_the_official_chat_makes_of_them(mode, tiny, tmp_path):
    check = Check(mode, tiny[mode], tmp_path)
    for number in range(8):
        check.run(f"{mode} {number}")
    kinds = {"conversations", "answers", "left out", "shortened", "cut", "packed"} | (
        {"calls"} if mode == "glm3" else set()
    )
    assert all(check.counts[kind] for kind in kinds), check.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=10_000, help="of each family")
    parser.add_argument("--mode", choices=MODE, action="append", help="only this family; may be given more than once")
    parser.add_argument("--seed", default="", help="another one makes other conversations")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as work:
        for mode in args.mode or MODE:
            make_lively_checkpoint(mode, f"{work}/{mode}", **TINY[mode])
            check, start = Check(mode, f"{work}/{mode}", Path(work)), time.time()
            for number in range(-(-args.conversations // TOGETHER)):
                seed = f"{args.seed}{mode} {number}"
                try:
                    check.run(seed)
                except (Exception, pytest.fail.Exception) as error:
                    failed += 1
                    print(f"  {seed}: {type(error).__name__}: {ascii(str(error))[:1500]}", flush=True)
            print(f"{mode}: {dict(check.counts)}, {failed} failures so far, {time.time() - start:.0f} s", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
