"""predict.py's chat in the terminal: what is typed and how it is shown. The model is one that has its answers ready."""

import io
import sys
from types import SimpleNamespace

import pytest

import predict
from glm_models.glm3 import ChatGLM3ForConditionalGeneration
from glm_models.tools import TOOLS_SYSTEM
from tuning.arguments.predict import parse_args
from tuning.errors import UserError
from tuning.exits import exit_on_user_errors


class Model:
    """Streams ready answers, piece by piece, and keeps the history that it was given with each question.

    A piece may be an exception, which is then raised.
    """

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def stream_chat(self, tokenizer, query, history, role=None, **options):
        self.asked.append((query, history))
        so_far = ""
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            so_far += piece
            yield so_far, [*(history or []), (query, so_far)]


CTRL_C = b"^C"


class Keyboard(io.TextIOWrapper):
    """What is typed, as the bytes of a terminal or a pipe; CTRL_C as a line of its own interrupts."""

    def __init__(self, *lines: bytes):
        super().__init__(io.BytesIO(b"".join(line + b"\n" for line in lines)), encoding="utf-8", errors="strict")

    def readline(self, *size):
        line = super().readline(*size)
        if line.encode(errors="surrogateescape").rstrip() == CTRL_C:
            raise KeyboardInterrupt
        return line


@pytest.fixture
def talk(monkeypatch, capsys):
    """talk(model, keyboard, **flags): what the terminal shows of a chat, without its first line."""

    def run(model, keyboard, **flags):
        monkeypatch.setattr(sys, "stdin", keyboard)
        tokenizer = SimpleNamespace(encode_prompt=lambda query, history, role="user": query + str(history or ""))
        args = {"do_sample": False, "top_p": 0.8, "temperature": 0.8, "max_length": 500, "system": None, "tools": None}
        args |= flags
        predict.chat(model, tokenizer, SimpleNamespace(**args))
        return capsys.readouterr().out.split("\n", 1)[1]

    return run


def typed(*texts):
    return Keyboard(*(text.encode() if isinstance(text, str) else text for text in texts))


def test_an_answer_grows_and_becomes_history(talk):
    model = Model(["水", "泵漏水"], ["好"])
    assert talk(model, typed("你好", "再见", "")) == "> 水泵漏水\n> 好\n> "
    assert model.asked == [("你好", None), ("再见", [("你好", "水泵漏水")])]


def test_new_begins_another_conversation_and_the_end_of_input_ends_it(talk):
    model = Model(["a"], ["b"])
    assert talk(model, typed("x", "/new", "y")) == "> a\n> > b\n> \n"
    assert model.asked == [("x", None), ("y", None)]


def test_ctrl_c_stops_an_answer_and_keeps_what_came(talk):
    model = Model(["水", "泵", KeyboardInterrupt()], ["好"])
    assert talk(model, typed("你好", "然后", "")) == "> 水泵 [stopped]\n> 好\n> "
    assert model.asked[1] == ("然后", [("你好", "水泵")])


def test_ctrl_c_before_the_first_token_is_as_if_nothing_was_asked(talk):
    model = Model(["a"], [KeyboardInterrupt()], ["b"])
    assert talk(model, typed("x", "y", "z", "")) == "> a\n>  [stopped]\n> b\n> "
    assert model.asked[2] == ("z", [("x", "a")])


def test_ctrl_c_where_a_question_is_asked_ends_the_chat(talk):
    model = Model()
    assert talk(model, typed(CTRL_C)) == "> \n"


@pytest.mark.parametrize("half", ["水泵".encode()[:-1], "水泵漏水".encode("gbk")])
def test_half_a_character_is_asked_again(talk, half):
    model = Model(["a"], ["b"])
    shown = talk(model, typed("x", half, "y", ""))
    assert shown == "> a\n> not valid utf-8 text, perhaps a half-erased character; please type it again\n> b\n> "
    assert [query for query, _ in model.asked] == ["x", "y"] and model.asked[1][1]


def test_a_conversation_that_is_full_says_so(talk):
    model = Model(["a" * 30], ["b"])
    shown = talk(model, typed("x", "y", "/new", "z", ""), max_length=40)
    assert "the conversation has 42 tokens, --max_length is 40; /new begins another" in shown
    assert [query for query, _ in model.asked] == ["x", "z"]


def test_what_would_move_the_cursor_is_shown_as_an_escape(talk):
    assert talk(Model(["a\x1b[2J", "\r\nb"]), typed("x", "")) == "> a\\x1b[2J\\r\nb\n> "


def glm3_model(text):
    """Answers a character at a time, with the official clean-up of ChatGLM3."""

    def stream_chat(tokenizer, query, history, **options):
        history = [*(history or []), {"role": "user", "content": query}]
        for end in range(1, len(text) + 1):
            yield ChatGLM3ForConditionalGeneration.process_response(text[:end], history)

    return SimpleNamespace(stream_chat=stream_chat)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\n 水泵漏水", "水泵漏水"),
        ("get_weather\ntool_call(city=3)", "get_weather\ntool_call(city=3)"),
        ("an untrained model\nbegins anyhow\nand goes on", "an untrained model\nbegins anyhow\nand goes on"),
    ],
)
def test_a_line_before_the_answer_is_shown_once(talk, text, shown):
    """ChatGLM3 names a tool there; each token then changes what `stream_chat` gives as a dict."""
    assert talk(glm3_model(text), typed("x", "")) == f"> {shown}\n> "


class Glm3:
    """Streams whole replies as ChatGLM3 does, and keeps what it was asked, with the role."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def stream_chat(self, tokenizer, query, history, role="user", **options):
        self.asked.append((role, query, history))
        history = [*(history or []), {"role": role, "content": query}]
        yield ChatGLM3ForConditionalGeneration.process_response(self.replies.pop(0), history)


CALL = "weather\n ```python\ntool_call(city='青河')\n```"


def test_a_call_is_shown_and_answered_with_an_observation(talk):
    model = Glm3(CALL, "\n 青河今天晴。", CALL)
    tools = [{"name": "weather"}]
    shown = talk(model, typed("天气？", '/observation {"天气": "晴"}', "/new", "再问", ""), tools=tools)
    told = '[calls weather with {"city": "青河"}; answer with /observation and what the tool returns]'
    assert shown.count(told) == 2 and "> 青河今天晴。\n> > weather" in shown
    start = [{"role": "system", "content": TOOLS_SYSTEM, "tools": tools}]
    (first, second, third) = model.asked
    assert first == ("user", "天气？", start) and third == ("user", "再问", start)
    assert second[:2] == ("observation", '{"天气": "晴"}')
    assert second[2] == [
        *start,
        {"role": "user", "content": "天气？"},
        {"role": "assistant", "metadata": "weather", "content": CALL.split("\n", 1)[1]},
    ]


def test_an_observation_without_a_call_is_refused_in_every_family(talk):
    for model in (Glm3("\n 好"), Model(["好"])):
        shown = talk(model, typed("/observation 晴", "你好", "/observation", ""), system=None)
        assert shown.count("/observation TEXT is what a tool returned; the model has not called one") == 2
        assert len(model.asked) == 1


def test_a_call_that_cannot_be_read_says_why_and_may_be_answered(talk):
    model = Glm3(CALL[:-4] + "+", "\n 好")
    shown = talk(model, typed("天气？", "/observation 晴", ""), system="你有工具。")
    assert "[a call of weather that cannot be read: " in shown
    assert model.asked[0][2] == [{"role": "system", "content": "你有工具。"}]
    assert model.asked[1][0] == "observation"


def test_tools_of_the_chat_are_read_from_a_file(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text('[{"name": "weather"}]')
    assert predict.read_tools(str(path)) == [{"name": "weather"}]
    for content in ("{}", "[1]", "["):
        path.write_text(content)
        with pytest.raises(UserError, match=r"--tools .*tools\.json: "):
            predict.read_tools(str(path))
    flags = ["--model_path", str(tmp_path), "--tools", str(path)]
    assert parse_args(["--mode", "glm3", *flags]).tools
    with pytest.raises(UserError, match="glm2 has neither system messages nor tools"):
        parse_args(["--mode", "glm2", *flags])
    with pytest.raises(UserError, match="are for the chat"):
        parse_args(["--mode", "glm3", *flags, "--input", "x"])


def test_an_error_of_the_model_ends_the_chat_with_its_own_words(talk):
    with pytest.raises(ZeroDivisionError), exit_on_user_errors():
        talk(Model(["a", ZeroDivisionError()]), typed("x"))
