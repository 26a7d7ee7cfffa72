"""Conversations as samples: what each family sees of the earlier turns, and which tokens are learnt."""

import json

import pytest

from glm_models import MODE
from tuning.samples.dialogue import Dialogue, Message
from tuning.samples.encoding import IGNORE_INDEX, encode_samples
from tuning.samples.formats import to_dialogue

TURNS = [("发动机水温高，怎么办？", "先看冷却液。"), ("风扇不转", "查继电器。\n再查。"), ("好了，谢谢", "不客气。")]


def conversation(turns, learnt):
    messages = []
    for number, (question, answer) in enumerate(turns):
        messages += [Message("user", question), Message("assistant", answer, learn=number in learnt)]
    return Dialogue(tuple(messages))


def pieces(sample):
    return [sample.input_ids[start:end] for start, end in sample.spans]


@pytest.mark.parametrize("mode", ["glm", "glm2"])
def test_each_learnt_answer_is_a_sample_with_its_history(tokenizers, mode):
    tokenizer = tokenizers[mode]
    dialogues = [conversation(TURNS, {0, 2}), conversation(TURNS[:1], {0}), conversation(TURNS, ())]
    samples = encode_samples(tokenizer, dialogues, 500, 400)
    assert samples.places.tolist() == [0, 0, 1]
    for sample, (turns, turn) in zip(samples, ((TURNS, 0), (TURNS, 2), (TURNS, 0)), strict=True):
        question, answer = turns[turn]
        assert sample.prompt == tokenizer.encode_prompt(question, turns[:turn])
        assert pieces(sample) == [[*tokenizer.encode_answer(answer), tokenizer.eos_token_id]]
        assert sample.spans[-1][1] == len(sample.input_ids)
        question = Dialogue(conversation(turns[: turn + 1], {turn}).asked)
        assert tokenizer.encode_questions([question])[0].ids.tolist() == sample.prompt


@pytest.mark.parametrize("mode", ["glm", "glm2"])
def test_families_without_tools_or_system_messages_say_so(tokenizers, mode):
    messages = (Message("system", "简短回答。"), *conversation(TURNS[:1], {0}).messages)
    with pytest.raises(ValueError, match="has no system message: write it into the first question"):
        tokenizers[mode].encode_dialogues([Dialogue(messages)])
    with pytest.raises(ValueError, match="user and assistant in turn, not user, user"):
        tokenizers[mode].encode_dialogues([Dialogue((messages[1], messages[1]))])
    with pytest.raises(ValueError, match="has no tools"):
        tokenizers[mode].encode_dialogues([conversation(TURNS[:1], {0})._replace(tools='[{"name": "time"}]')])


def test_chatglm3_learns_several_answers_in_one_sample(tokenizers):
    tokenizer = tokenizers["glm3"]
    sample = encode_samples(tokenizer, [conversation(TURNS, {0, 2})], 500, 400)[0]
    ids, labels = [], []
    for message in conversation(TURNS, {0, 2}).messages:
        one = tokenizer.build_single_message(message.role, "", message.content)
        ends_a_learnt_answer = len(labels) and labels[-1] != IGNORE_INDEX
        labels += one[:1] if ends_a_learnt_answer else [IGNORE_INDEX]
        labels += one[1:] if message.learn else [IGNORE_INDEX] * (len(one) - 1)
        ids += one
    prefix = tokenizer.get_prefix_tokens()
    assert sample.input_ids == [*prefix, *ids, tokenizer.eos_token_id]
    assert sample.labels == [*[IGNORE_INDEX] * len(prefix), *labels, tokenizer.eos_token_id]
    user = tokenizer.get_command("<|user|>")
    assert [piece[-1] for piece in pieces(sample)] == [user, tokenizer.eos_token_id]  # what stops the official chat
    assert sample.prompt == tokenizer.encode_prompt(TURNS[0][0])


def test_chatglm3_writes_tools_as_its_chat_does(tokenizers):
    tokenizer = tokenizers["glm3"]
    tools = [{"name": "time", "参数": {}}]
    history = [
        {"role": "system", "content": "需要时用工具。", "tools": tools},
        {"role": "user", "content": "几点？"},
        {"role": "assistant", "metadata": "time", "content": "```python\ntool_call()\n```"},
    ]
    messages = [Message(m["role"], m["content"], m.get("metadata", ""), m["role"] == "assistant") for m in history]
    messages += [Message("observation", "10:30"), Message("assistant", "十点半。", learn=True)]
    dialogue = Dialogue(tuple(messages), json.dumps(tools))
    sample = encode_samples(tokenizer, [dialogue], 1000, 1000)[0]
    second = tokenizer.encode_prompt("10:30", history, role="observation")
    assert sample.input_ids[: sample.spans[1][0]] == second
    assert tokenizer.encode_questions([Dialogue(dialogue.asked, json.dumps(tools))])[0].ids.tolist() == second
    call = tokenizer.build_single_message("assistant", "time", history[-1]["content"])
    assert pieces(sample)[0] == [*call[1:], tokenizer.get_command("<|observation|>")]
    assert pieces(sample)[1] == [*tokenizer.encode_answer("十点半。"), tokenizer.eos_token_id]
    # without a system message the official sentence stands before the tools
    bare = tokenizer.encode_questions([Dialogue((Message("user", "几点？"),), json.dumps(tools))])[0].ids.tolist()
    text = tokenizer.decode(bare)
    assert "You have access to the following tools:" in text
    assert json.dumps(tools, indent=4, ensure_ascii=False) in text


def fewest_turns_dropped(tokenizer, turns, learnt, max_len, max_src_len):
    """What a conversation that is too long should become, tried one by one. Returns samples and how many are gone."""
    for dropped in range(learnt[-1] + 1):
        left = conversation(turns[dropped:], {i - dropped for i in learnt if i >= dropped})
        whole = encode_samples(tokenizer, [left], 5000, None)[0]
        counted = len(whole.prompt) - {"glm": 2, "glm2": 2, "glm3": 3}[tokenizer.mode]
        if len(whole.input_ids) <= max_len and counted <= max_src_len:
            return whole, dropped
    return encode_samples(tokenizer, [conversation(turns[learnt[-1] :], {0})], max_len, max_src_len)[0], learnt[-1]


@pytest.mark.parametrize("mode", MODE)
@pytest.mark.parametrize("learnt", [(5,), (0, 2, 4, 5)])
def test_a_conversation_that_is_too_long_loses_turns_from_its_beginning(tokenizers, mode, learnt):
    tokenizer, turns = tokenizers[mode], TURNS + [(q + "水泵" * 9, a) for q, a in TURNS]
    dialogue = conversation(turns, learnt)
    # the families without one sample for all answers have one for each, with the turns up to it
    parts = [learnt] if mode == "glm3" else [(one,) for one in learnt]
    longest = len(encode_samples(tokenizer, [dialogue], 5000, None)[len(parts) - 1].input_ids)
    for max_len in range(80, longest + 2, 11):
        for max_src_len in (max_len - 30, 60):
            found = encode_samples(tokenizer, [dialogue], max_len, max_src_len)
            assert len(found) == len(parts)
            for sample, part in zip(found, parts, strict=True):
                some = turns if mode == "glm3" else turns[: part[0] + 1]
                wanted, dropped = fewest_turns_dropped(tokenizer, some, part, max_len, max_src_len)
                assert sample.dropped == dropped
                assert sample._replace(dropped=0) == wanted
        question = Dialogue(dialogue.asked)
        prompt = tokenizer.encode_questions([question], max_len)[0]
        left = Dialogue(question.messages[2 * prompt.dropped :])
        assert prompt.ids.tolist() == tokenizer.encode_questions([left], max_len)[0].ids.tolist()
        assert prompt.cut == (prompt.dropped == 5 and tokenizer.encode_questions([left])[0].ids.size > prompt.ids.size)
        assert (
            prompt.dropped == 0
            or len(tokenizer.encode_questions([Dialogue(question.messages[2 * prompt.dropped - 2 :])])[0].ids) > max_len
        )


def test_system_message_and_tools_stay_in_a_conversation_that_is_too_long(tokenizers):
    tokenizer, system = tokenizers["glm3"], Message("system", "说话简短。")
    dialogue = Dialogue((system, *conversation(TURNS, {0, 1, 2}).messages), '[{"name": "time"}]')
    sample = encode_samples(tokenizer, [dialogue], 100, 90)[0]
    assert sample.dropped == 1 and len(sample.input_ids) <= 100
    left = dialogue._replace(messages=(system, *dialogue.messages[3:]))
    assert sample.input_ids == encode_samples(tokenizer, [left], 500, 400)[0].input_ids
    # where even they do not fit, the row alone is left out
    no_room = {}
    others = encode_samples(tokenizer, [dialogue, conversation(TURNS, {0})], 500, 30, no_room=no_room)
    assert [*no_room] == [0] and "max_src_len 30 is less than the" in no_room[0] and others.places.tolist() == [1]


def test_messages_that_do_not_fit_before_an_answer_break_their_row_alone(tokenizers):
    tokenizer, call = tokenizers["glm3"], Message("assistant", "```python\ntool_call()\n```", "time")
    long = Dialogue(
        (Message("user", "几点？" * 20), call, Message("observation", "九"), Message("assistant", "九点", "", True))
    )
    no_room = {}
    others = encode_samples(tokenizer, [long, conversation(TURNS, {0})], 500, 40, no_room=no_room)
    assert others.places.tolist() == [1] and "of what stands before the last message" in no_room[0]


def test_a_question_that_leaves_no_ids_is_a_question_all_the_same(tokenizers):
    turns = [*TURNS, ("\u200b", "水泵漏水" * 20)]  # ChatGLM-6B's vocabulary normalises this character away
    for learnt, dialogue in (
        (1, conversation(turns, {3})),
        (1, conversation(turns[3:], {0})),
        (4, conversation(turns, range(4))),
    ):
        samples = encode_samples(tokenizers["glm"], [dialogue, conversation(TURNS, {0})], 60, 60)
        assert samples.places.tolist() == [0] * learnt + [1]


def test_a_tool_call_at_the_end_is_learnt_with_what_stops_the_chat(tokenizers):
    call = Message("assistant", "```python\ntool_call()\n```", "time", learn=True)
    sample = encode_samples(tokenizers["glm3"], [Dialogue((Message("user", "几点？"), call))], 500, 400)[0]
    assert sample.labels[-1] == sample.input_ids[-1] == tokenizers["glm3"].get_command("<|observation|>")


@pytest.mark.parametrize("mode", MODE)
def test_cuts_shorten_the_question_and_the_spans(tokenizers, mode):
    tokenizer, dialogue = tokenizers[mode], conversation(TURNS, {0})
    whole = encode_samples(tokenizer, [dialogue._replace(messages=dialogue.messages[:2])], 500, 400)
    for max_len in range(len(whole[0].prompt) + 1, len(whole[0].input_ids) + 1):
        (cut,) = encode_samples(tokenizer, [dialogue._replace(messages=dialogue.messages[:2])], max_len, 400)
        assert cut.input_ids == whole[0].input_ids[:max_len]
        assert cut.labels == whole[0].labels[:max_len]
        assert cut.answer_cut == (len(whole[0].input_ids) > max_len)
    counted = len(whole[0].prompt) - {"glm": 2, "glm2": 2, "glm3": 3}[mode]
    shorter = encode_samples(tokenizer, [conversation(TURNS, {0})], 500, counted - 2)[0]
    assert shorter.prompt_cut and len(shorter.prompt) == len(whole[0].prompt) - 2


def test_rows_have_one_normal_form():
    row = {"instruction": "查", "input": "油", "output": "漏"}
    question, answer = Message("user", "查油"), Message("assistant", "漏", learn=True)
    assert to_dialogue(row) == Dialogue((question, answer))
    assert to_dialogue(row | {"output": ["漏", "不漏"]}) == to_dialogue(row)
    assert to_dialogue({"instruction": "查", "input": "油"}) == Dialogue((question,))
    assert (to_dialogue(row).prompt, to_dialogue(row).answer, to_dialogue(row).prompt_key) == ("查油", "漏", "查油")
    many = conversation(TURNS, {2})
    assert many.prompt_key != many._replace(tools="[]").prompt_key != conversation(TURNS[1:], {1}).prompt_key
    assert many.answer == TURNS[-1][1] and TURNS[0][1] in many.prompt and many.answer not in many.prompt
