"""Make tools_0.json, tools_1.json and tools_2.json: a tool is called, and the answer tells what it returned.

    python data/make_tools.py                    # rewrites the three files, byte for byte the same
    python data/make_tools.py --check            # only checks the files that are there
    python data/make_tools.py --base 3000 FILE   # writes rows that a small base learns tools from, in another form
    python data/make_tools.py --repeat 5000 FILE # writes words to repeat: a small base learns to copy first
    python data/make_tools.py --text FILE        # writes what a model reads in tools_0, to train a tokenizer on

The rows have the official form of ChatGLM3: `tools`, and `conversations` with user, tool and assistant messages, a tool
message holding name, parameters and observation. All text is put together from the lists below with a fixed seed;
places, people, orders and number plates are invented. tools_0 is for training. A row of tools_1 ends with the call that
is wanted, the row of tools_2 on the same line goes on to the answer. Their calls are new: none is in tools_0, and none
of their places and people is one of tools_0. Only the standard library and the project's own modules are used.
"""

import itertools
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from glm_models.tools import read_parameters, write_call, write_observation, write_parameters  # noqa: E402
from tuning.arguments.parser import SWITCH, Integer, Parser, answer_early  # noqa: E402

SEED = 20230408
TRAIN, TEST = 1200, 100

# The official chat's system message before the tools.
SYSTEM = "Answer the following questions as best as you can. You have access to the following tools:"

# Places and people are put together from characters, so that a model must copy them and cannot know them. No character
# stands in two of these lists: which one comes next is then easy to find for a small model.
PLACE_FIRST = "青云白石金玉清长安福新古东南西北高大明秋春松柳竹梅桃兰龙凤鹤"
PLACE_LAST = "河山州城桥江湖海岭泉原口"
SURNAMES = "王李张刘陈杨赵黄周吴徐孙朱马胡林郭何罗梁"
GIVEN_FIRST = "伟芳敏静丽强志军洋永艳"
GIVEN_LAST = "杰娟涛超霞平刚文辉玲斌宁"
DAYS = ("今天", "明天", "后天")
SKIES = ("晴", "多云", "阴", "小雨", "大雨", "小雪", "大风")
OPERATIONS = {"加": lambda a, b: a + b, "减": lambda a, b: a - b, "乘": lambda a, b: a * b}
STATES = ("运输中", "已发货", "派送中", "已签收")
SYSTEMS = ("发动机", "变速箱", "空调", "气囊", "转向", "制动")
WORDS = (*DAYS, *SKIES, *OPERATIONS, *STATES, *SYSTEMS)

# Tools as the model sees them: name -> description, parameters with what each is. The official form leaves open how a
# tool is described; here it is one line, so that the small model of the quick start has little to read.
TOOLS = {
    "weather": ("查天气", {"city": "城市", "day": "哪天"}),
    "calculate": ("计算", {"a": "数", "op": "加、减或乘", "b": "数"}),
    "track_order": ("查订单", {"number": "订单号"}),
    "find_phone": ("查电话", {"name": "姓名"}),
    "read_obd": ("读故障码", {"plate": "车牌尾号", "system": "系统"}),
    "book_table": ("订桌", {"name": "姓名", "people": "人数", "hour": "几点"}),
}
REPEAT = "重复："
QUESTIONS = {
    "weather": (
        "{city}{day}天气怎么样？",
        "{day}{city}会下雨吗？",
        "查一下{city}{day}的天气。",
        "{day}要去{city}，天气好吗？",
        "请问{city}{day}冷不冷？",
    ),
    "calculate": (
        "{a}{op}{b}等于多少？",
        "帮我算一下{a}{op}{b}。",
        "{a}{op}{b}是几？",
        "请计算{a}{op}{b}。",
    ),
    "track_order": (
        "订单{number}到哪了？",
        "帮我查一下订单{number}。",
        "我的订单号是{number}，发货了吗？",
        "{number}这个订单怎么还没到？",
    ),
    "find_phone": (
        "{name}的电话是多少？",
        "怎么联系{name}？",
        "我想给{name}打电话。",
        "查一下{name}的号码。",
    ),
    "read_obd": (
        "读一下尾号{plate}的{system}故障码。",
        "尾号{plate}的车，{system}灯亮了。",
        "车牌尾号{plate}，{system}有什么故障？",
        "帮我看看尾号{plate}的{system}。",
    ),
    "book_table": (
        "帮{name}订{hour}点的桌子，{people}个人。",
        "{name}要订位，{people}人，{hour}点到。",
        "{hour}点订一张{people}人桌，姓名{name}。",
        "我是{name}，{hour}点有{people}个人吃饭。",
    ),
}
GREETINGS = (
    ("你好", "你好，请说。"),
    ("您好", "您好，请问要办什么事？"),
    ("在吗？", "在，请说。"),
    ("早上好", "早上好，请说。"),
)
CLOSINGS = (("谢谢", "不客气。"), ("好的，谢谢", "不用谢。"), ("知道了", "好的，有事再找我。"), ("再见", "再见。"))


class Values:
    """Draws parameters; places and people from one of two disjoint parts, for training or for the test."""

    def __init__(self, rng: random.Random, test: bool):
        self.rng = rng
        names = random.Random(SEED)
        places = [a + b for a in PLACE_FIRST for b in PLACE_LAST]
        people = [a + b + c for a in SURNAMES for b in ("", *GIVEN_FIRST) for c in GIVEN_LAST]
        for pool in (places, people):
            names.shuffle(pool)
        self.places, self.people = (
            pool[: len(pool) // 8] if test else pool[len(pool) // 8 :] for pool in (places, people)
        )

    def number(self, digits: int) -> int:
        """A number in which no digit occurs twice: a small model finds the next digit by the one before it."""
        first, *rest = self.rng.sample("0123456789", digits)
        if first == "0" and rest:
            first, rest[0] = rest[0], first
        return int("".join((first, *rest)))

    def draw(self, name: str) -> dict:
        """The parameters of one call."""
        choice = self.rng.choice
        if name == "weather":
            return {"city": choice(self.places), "day": choice(DAYS)}
        if name == "calculate":
            a, b = sorted((self.number(2), self.number(2)), reverse=True)
            return {"a": a, "op": choice(list(OPERATIONS)), "b": b}
        if name == "track_order":
            return {"number": self.number(4)}
        if name == "find_phone":
            return {"name": choice(self.people)}
        if name == "read_obd":
            return {"plate": self.number(3), "system": choice(SYSTEMS)}
        return {"name": choice(self.people), "people": self.rng.randint(2, 20), "hour": self.rng.randint(10, 21)}

    def result(self, name: str, given: dict) -> tuple[object, str]:
        """What the tool returns for these parameters, and the answer that says it."""
        choice = self.rng.choice
        if name == "weather":
            sky = choice(SKIES)
            degrees = self.rng.randint(-9, 1) if sky == "小雪" else self.rng.randint(2, 35)
            return {"天气": sky, "气温": degrees}, "{city}{day}{sky}，{degrees}度。".format(
                **given, sky=sky, degrees=degrees
            )
        if name == "calculate":
            value = OPERATIONS[given["op"]](given["a"], given["b"])
            return value, "{a}{op}{b}等于{value}。".format(**given, value=value)
        if name == "track_order":
            state, place = choice(STATES), choice(self.places)
            return {"状态": state, "位置": place}, f"订单{given['number']}{state}，现在在{place}。"
        if name == "find_phone":
            phone = str(self.number(4))
            return phone, f"{given['name']}的电话是{phone}。"
        if name == "read_obd":
            codes = [f"P03{self.number(2)}" for _ in range(choice((0, 1, 1, 2)))]
            said = f"有故障码{'和'.join(codes)}" if codes else "没有故障码"
            return {"codes": codes}, "尾号{plate}的{system}{said}。".format(**given, said=said)
        if self.rng.random() < 0.2:
            return {"ok": False, "table": None}, f"{given['hour']}点没有桌子了。"
        table = self.rng.randint(1, 40)
        return {"ok": True, "table": table}, "订好了：{name}，{people}人，{hour}点，{table}号桌。".format(
            **given, table=table
        )


def described(name: str) -> dict:
    """A tool as a row's `tools` has it."""
    what, parameters = TOOLS[name]
    return {"name": name, "description": f"{what}：" + "，".join(f"{key} {word}" for key, word in parameters.items())}


def call_key(name: str, parameters: dict) -> str:
    return json.dumps([name, parameters], ensure_ascii=False, sort_keys=True)


class Maker:
    """Makes rows without a call of `taken`; `unique`: no call occurs twice (a few thousand rows have calls enough)."""

    def __init__(self, seed: int, test: bool, taken: set[str] = frozenset(), unique: bool = True):
        self.rng = random.Random(seed)
        self.unique = unique
        self.values = Values(self.rng, test)
        self.seen = set(taken)

    def call(self, name: str) -> list[dict]:
        """A question, the call of a tool and the answer."""
        parameters = self.values.draw(name)
        while call_key(name, parameters) in self.seen:
            parameters = self.values.draw(name)
        if self.unique:
            self.seen.add(call_key(name, parameters))
        observation, answer = self.values.result(name, parameters)
        return [
            {"role": "user", "content": self.rng.choice(QUESTIONS[name]).format(**parameters)},
            {"role": "tool", "name": name, "parameters": parameters, "observation": observation},
            {"role": "assistant", "content": answer},
        ]

    def chat(self, pairs) -> list[dict]:
        question, answer = self.rng.choice(pairs)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def row(self) -> dict:
        """One conversation: most call one tool, some two, some are greetings with or without a call."""
        form = self.rng.random()
        names = self.rng.sample(list(TOOLS), 2)
        called = names if form < 0.1 else [] if form > 0.95 else names[:1]
        messages = self.chat(GREETINGS) if 0.1 <= form < 0.2 or form > 0.95 else []
        for name in called:
            messages += self.call(name)
        messages += self.chat(CLOSINGS) if 0.2 <= form < 0.3 else []
        # in three rows of ten a second tool stands beside the called one
        offered = names if len(called) == 2 or self.rng.random() < 0.3 else names[:1]
        tools = [described(name) for name in self.rng.sample(offered, len(offered))]
        return {"tools": tools, "conversations": messages}


def make_tools(train: int = TRAIN, test: int = TEST) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows to train on, rows that end with a new call, and the same rows up to the answer."""
    held_out = Maker(SEED + 1, test=True)
    answers = list(itertools.islice((part for _ in itertools.count() for part in answers_in(held_out.row())), test))
    maker = Maker(SEED, test=False, taken=held_out.seen)
    return [maker.row() for _ in range(train)], [up_to_call(row) for row in answers], answers


def answers_in(row: dict) -> list[dict]:
    """The row up to each answer that follows a call; none if no tool is called."""
    messages = row["conversations"]
    ends = [i + 2 for i, message in enumerate(messages) if message["role"] == "tool"]
    return [row | {"conversations": messages[:end]} for end in ends]


def up_to_call(row: dict) -> dict:
    """A row of `answers_in` up to its last call, which becomes the message that a model has to write."""
    *before, call, _ = row["conversations"]
    return row | {"conversations": [*before, write_call(call["name"], call["parameters"])]}


def make_base(count: int) -> list[dict]:
    """Rows from which a small base learns to read questions and tools, without a call of tools_1.

    In two rows of three it says in words what it would call, in the third it calls as in tools_0: so the base knows the
    task a little, as a real base does. Some calls are in tools_0 too, some occur twice.
    """
    maker = Maker(SEED + 2, test=False, taken=calls_of(read_rows("tools_2.json")), unique=False)
    rows = [maker.row() for _ in range(count)]
    return [in_words(row) if i % 3 else row for i, row in enumerate(rows)]


def in_words(row: dict) -> dict:
    """The row with an answer in words in place of its first call and all that follows."""
    messages = row["conversations"]
    place = next((i for i, message in enumerate(messages) if message["role"] == "tool"), None)
    if place is None:
        return row
    said = "，".join(f"{key} {value}" for key, value in messages[place]["parameters"].items())
    answer = {"role": "assistant", "content": f"{messages[place]['name']}：{said}"}
    return row | {"conversations": [*messages[:place], answer]}


def make_repeats(count: int) -> list[dict]:
    """Rows that ask to repeat places, people, numbers and words; no place or person of tools_1.

    A random model learns the form of a call in minutes, but to copy from the question only after many more: rows that
    are nothing but copying teach it that in fewer.
    """
    rng = random.Random(SEED + 3)
    values = Values(rng, test=False)
    draws = (
        lambda: rng.choice(values.places),
        lambda: rng.choice(values.people),
        lambda: rng.choice(WORDS),
        *[lambda: str(values.number(rng.randint(1, 4)))] * 3,
    )
    rows = []
    for _ in range(count):
        text = "，".join(rng.choice(draws)() for _ in range(rng.randint(2, 5)))
        messages = [{"role": "user", "content": REPEAT + text}, {"role": "assistant", "content": text}]
        rows.append({"conversations": messages})
    return rows


# ---- writing and checking


def read_rows(name: str) -> list[dict]:
    with open(HERE / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def lines_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def call_in(message: dict) -> tuple[str, dict]:
    """Name and parameters of the call in a message; the name is "" if there is none."""
    if message["role"] == "tool":
        return message["name"], message["parameters"]
    name = message.get("metadata", "")
    return name, read_parameters(message["content"]) if name else {}


def calls_of(rows: list[dict]) -> set[str]:
    calls = (call_in(message) for row in rows for message in row["conversations"])
    return {call_key(name, parameters) for name, parameters in calls if name}


def tokenizer_text(rows: list[dict]) -> str:
    """What a model reads of these rows, a text to train a tokenizer on.

    The digit 0 stands for all that is copied from a question or an observation, since a digit is always a piece of its
    own: the characters get pieces (by the last line) but are never merged, or a new name would be cut in another way
    than known ones.
    """
    copied = {*WORDS}
    for message in (message for row in rows for message in row["conversations"] if message["role"] == "tool"):
        values = [*message["parameters"].values()]
        values += message["observation"].values() if isinstance(message["observation"], dict) else []
        copied |= {value for value in values if isinstance(value, str)}
    texts = [REPEAT] * 20
    for row in rows:
        texts += [SYSTEM, json.dumps(row["tools"], indent=4, ensure_ascii=False)]
        for message in row["conversations"]:
            if message["role"] == "tool":
                texts += [message["name"], write_parameters(message["parameters"])]
                texts.append(write_observation(message["observation"]))
            else:
                texts.append(message["content"])
    text = "\n".join(texts)
    for word in sorted(copied, key=lambda word: (-len(word), word)):
        text = text.replace(word, "0")
    characters = PLACE_FIRST + PLACE_LAST + SURNAMES + GIVEN_FIRST + GIVEN_LAST + "".join(WORDS)
    return f"{text}\n{'0'.join(dict.fromkeys(characters))}\n"


def check() -> None:
    """Fail loudly if the files break a promise of the README; print their statistics."""
    train, calls, answers = (read_rows(f"tools_{part}.json") for part in range(3))
    assert calls == [up_to_call(row) for row in answers], "tools_1 and tools_2 are not of the same conversations"
    assert not calls_of(train) & calls_of(answers), "a test call is in the training file"
    train_text = lines_of(train)
    for message in (m for row in answers for m in row["conversations"] if m["role"] == "tool"):
        for key in ("city", "name"):
            name = message["parameters"].get(key)
            assert name is None or f'"{key}": "{name}"' not in train_text, name
    for part, rows in enumerate((train, calls, answers)):
        name = f"tools_{part}"
        assert (HERE / f"{name}.json").stat().st_size < 1_000_000, name
        counts = dict.fromkeys(TOOLS, 0)
        for row in rows:
            offered = {tool["name"] for tool in row["tools"]}
            for tool, parameters in map(call_in, row["conversations"]):
                if tool:
                    assert tool in offered, row
                    assert parameters.keys() == TOOLS[tool][1].keys(), row
                    counts[tool] += 1
        print(f"{name}: {len(rows)} rows, {sum(counts.values())} calls {counts}")


def parse_args(argv=None):
    """The flags. Raises UserError: see Parser.parse_args."""
    parser = Parser(__doc__, contradictions)
    group = parser.group("what is made (default: the three files)")
    group.add_argument("--check", **SWITCH, help="check the files that are there and write nothing")
    group.add_argument(
        "--base", nargs="+", metavar="COUNT FILE", help="write rows for a small base, no call of tools_1 in them"
    )
    group.add_argument("--repeat", nargs="+", metavar="COUNT FILE", help="write rows that ask to repeat a text")
    group.add_argument("--text", metavar="FILE", help="write the texts of tools_0, to train a tokenizer on")
    return parser.parse_args(argv)


def contradictions(args) -> list[str]:
    """What is wrong with the flags; see Parser."""
    given = [flag for flag in ("check", "base", "repeat", "text") if getattr(args, flag)]
    wrong = [f"--{' and --'.join(given)} exclude each other"] if len(given) > 1 else []
    for flag in ("base", "repeat"):
        if (values := getattr(args, flag)) is None:
            continue
        if len(values) != 2:
            wrong.append(f"--{flag} takes a count and a file, not {' '.join(values)}")
            continue
        try:
            Integer()(values[0])
        except ValueError as error:
            wrong.append(f"--{flag} {values[0]}: {error}")
    return wrong


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def main():
    answer_early(parse_args)
    args = parse_args()
    try:
        if args.base:
            write(Path(args.base[1]), lines_of(make_base(int(args.base[0]))))
        elif args.repeat:
            write(Path(args.repeat[1]), lines_of(make_repeats(int(args.repeat[0]))))
        elif args.text:
            write(Path(args.text), tokenizer_text(read_rows("tools_0.json")))
        else:
            if not args.check:
                for part, rows in enumerate(make_tools()):
                    write(HERE / f"tools_{part}.json", lines_of(rows))
            check()
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
