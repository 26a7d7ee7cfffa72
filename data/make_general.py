"""Make general.json: small everyday tasks to mix into training, so that a model forgets less of what it could do.

    python data/make_general.py    # rewrites general.json, byte for byte the same

Five categories, those of forgetting.json: translation both ways, code, general questions, chat. All text is put
together from the word lists below with a fixed seed; no row is one of forgetting.json. Only the standard library is
used.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20230407
ROWS = 120  # of each category

# --------------------------------------------------------------------------------------
# translation: the same sentence in both languages, word by word
# --------------------------------------------------------------------------------------
WHO = """
我妈妈 My mother
我爸爸 My father
我哥哥 My brother
我姐姐 My sister
王老师 Teacher Wang
李医生 Doctor Li
张先生 Mr Zhang
那个学生 That student
我的邻居 My neighbour
这位司机 This driver
"""
WHEN = """
今天早上 this morning
昨天 yesterday
昨天晚上 last night
上个星期 last week
上个月 last month
星期一 on Monday
星期五 on Friday
中午 at noon
"""
# where something is done, and what
DID = """
# 在家里 at home
- 做了晚饭 cooked dinner
- 修好了电脑 repaired the computer
- 洗了衣服 washed the clothes
- 写了一封信 wrote a letter
# 在办公室 in the office
- 开了一个会 held a meeting
- 读了报告 read the report
- 打印了文件 printed the documents
- 写了一封信 wrote a letter
# 在公园里 in the park
- 画了一棵树 drew a tree
- 遇到了一位老朋友 met an old friend
- 拍了很多照片 took many photos
- 丢了钥匙 lost the keys
# 在商店里 in the shop
- 买了一双鞋 bought a pair of shoes
- 买了三个苹果 bought three apples
- 遇到了一位老朋友 met an old friend
- 丢了钥匙 lost the keys
# 在图书馆 in the library
- 借了两本书 borrowed two books
- 读了报告 read the report
- 做完了作业 finished the homework
- 学了英语 studied English
"""
TO_ENGLISH = ["把下面的句子翻译成英文：", "请翻译成英语：", "Translate into English: "]
TO_CHINESE = ["把下面的句子翻译成中文：", "请翻译成汉语：", "Translate into Chinese: "]


def pairs(text):
    """(Chinese, English) of each line; the Chinese has no space."""
    return [tuple(line.split(" ", 1)) for line in text.strip().split("\n")]


def sentence(rng):
    """One sentence, in Chinese and English."""
    place, *things = rng.choice(DID.strip().removeprefix("# ").split("\n# ")).split("\n- ")
    place, did = place.split(" ", 1), rng.choice(pairs("\n".join(things)))
    who, when = rng.choice(pairs(WHO)), rng.choice(pairs(WHEN))
    return f"{who[0]}{when[0]}{place[0]}{did[0]}。", f"{who[1]} {did[1]} {place[1]} {when[1]}."


def to_english(rng):
    chinese, english = sentence(rng)
    return rng.choice(TO_ENGLISH), chinese, english


def to_chinese(rng):
    chinese, english = sentence(rng)
    return rng.choice(TO_CHINESE), english, chinese


# --------------------------------------------------------------------------------------
# code
# --------------------------------------------------------------------------------------
REDUCE = "最大值 maximum max,最小值 minimum min,总和 sum sum,元素个数 length len"
LISTS = "numbers values prices scores ages weights heights items"
ASK_FUNCTION = [
    "用 Python 写一个函数 {f}，返回列表 {v} 的{zh}。",
    "Write a Python function {f} that returns the {en} of the list {v}.",
]
ASK_CALL = ["{call} 的结果是什么？", "What does {call} return in Python?"]


def code(rng):
    kind = rng.randrange(4)
    if kind == 0:
        chinese, english, function = rng.choice(REDUCE.split(",")).split()
        value = rng.choice(LISTS.split())
        name = f"{english}_of_{value}"
        ask = rng.choice(ASK_FUNCTION).format(f=name, v=value, zh=chinese, en=english)
        return ask, "", f"def {name}({value}):\n    return {function}({value})"
    if kind == 1:
        function = rng.choice(["max", "min", "sum", "len", "sorted"])
        values = rng.sample(range(1, 30), 3)
        call = f"{function}({values})"
        result = {"max": max, "min": min, "sum": sum, "len": len, "sorted": sorted}[function](values)
        return rng.choice(ASK_CALL).format(call=call), "", str(result)
    if kind == 2:
        count, step = rng.randrange(5, 50), rng.choice([1, 2, 3, 5])
        every = "" if step == 1 else f", {step}"
        ask = f"用 Python 的 for 循环打印 0 到 {count} 的数，步长为 {step}。"
        return ask, "", f"for n in range(0, {count + 1}{every}):\n    print(n)"
    chinese, column = rng.choice([("年龄", "age"), ("价格", "price"), ("重量", "weight"), ("数量", "amount")])
    table, limit = rng.choice(["people", "goods", "orders", "parcels"]), rng.randrange(2, 40) * 5
    return (
        f"写一条 SQL，从表 {table} 中选出{chinese}（{column}）大于 {limit} 的行。",
        "",
        (f"SELECT * FROM {table} WHERE {column} > {limit};"),
    )


# --------------------------------------------------------------------------------------
# general questions
# --------------------------------------------------------------------------------------
UNITS = "个小时 分钟 60,分钟 秒 60,天 个小时 24,个星期 天 7,米 厘米 100,千米 米 1000,公斤 克 1000,元 角 10,年 个月 12"
CAPITALS = """
中国 北京 China Beijing
日本 东京 Japan Tokyo
英国 伦敦 Britain London
德国 柏林 Germany Berlin
意大利 罗马 Italy Rome
西班牙 马德里 Spain Madrid
俄罗斯 莫斯科 Russia Moscow
埃及 开罗 Egypt Cairo
泰国 曼谷 Thailand Bangkok
希腊 雅典 Greece Athens
加拿大 渥太华 Canada Ottawa
古巴 哈瓦那 Cuba Havana
"""
OPPOSITES = "大 小,高 低,长 短,快 慢,冷 热,新 旧,轻 重,远 近,深 浅,宽 窄,早 晚,多 少,软 硬,干 湿,明 暗,胖 瘦"
DAYS = "一二三四五六日"


def question(rng):
    kind = rng.randrange(5)
    if kind == 0:
        large, small, factor = rng.choice(UNITS.split(",")).split()
        count = rng.randrange(2, 21)
        return f"{count} {large}是多少{small}？", "", f"{count} {large}是 {count * int(factor)} {small}。"
    if kind == 1:
        country, capital, in_english, city = rng.choice(CAPITALS.strip().split("\n")).split()
        if rng.random() < 0.5:
            return (
                rng.choice([f"{country}的首都是哪里？", f"哪座城市是{country}的首都？"]),
                "",
                f"{country}的首都是{capital}。",
            )
        return f"What is the capital of {in_english}?", "", f"The capital of {in_english} is {city}."
    if kind == 2:
        one, other = rng.sample(rng.choice(OPPOSITES.split(",")).split(), 2)
        return (
            rng.choice([f"“{one}”的反义词是什么？", f"和“{one}”意思相反的字是哪一个？"]),
            "",
            f"“{one}”的反义词是“{other}”。",
        )
    if kind == 3:
        day, later = rng.randrange(7), rng.randrange(1, 7)
        return f"今天星期{DAYS[day]}，{later} 天以后是星期几？", "", f"星期{DAYS[(day + later) % 7]}。"
    one, other = rng.randrange(2, 50), rng.randrange(2, 50)
    return f"{one} 加 {other} 等于多少？", "", f"{one} + {other} = {one + other}。"


# --------------------------------------------------------------------------------------
# chat
# --------------------------------------------------------------------------------------
LIKE = ["跑步", "画画", "唱歌", "做饭", "摄影", "下棋", "游泳", "种花", "钓鱼", "写字"]
FEEL = {
    "高兴": "真好，听到这个我也很开心！是什么让你这么{feel}？",
    "难过": "别太难过了，愿意的话可以和我说说，我在听。",
    "紧张": "先慢慢深呼吸几次，准备好了就不用怕，你可以的。",
    "无聊": "那就做点喜欢的事吧，比如{like}，时间会过得很快。",
    "累": "辛苦了，先休息一下，听听音乐，早点睡觉。",
}
HELLO = ["早上好", "下午好", "晚上好", "你好", "您好"]
GOODBYE = {
    "我要去上班了": "路上小心，工作顺利！",
    "我要睡觉了": "晚安，做个好梦！",
    "我要去吃饭了": "慢慢吃，祝你胃口好！",
    "我要出门了": "注意安全，玩得开心！",
}


def chat(rng):
    kind, like, hello = rng.randrange(4), rng.choice(LIKE), rng.choice(HELLO)
    if kind == 0:
        feel = rng.choice(list(FEEL))
        asked = rng.choice(
            [f"{hello}，我今天很{feel}。", f"我现在有点{feel}。", f"{hello}，不知道为什么，我觉得很{feel}。"]
        )
        return asked, "", FEEL[feel].format(feel=feel, like=like)
    if kind == 1:
        asked = rng.choice(
            [f"{hello}，我想学{like}，你有什么建议？", f"我对{like}很感兴趣，该怎么开始？", f"零基础怎么学{like}？"]
        )
        return asked, "", f"学{like}要慢慢来：先找一位老师或者一本入门书，每天练习半个小时，坚持最重要。"
    if kind == 2:
        leaving = rng.choice(list(GOODBYE))
        asked = rng.choice(
            [f"不聊了，{leaving}，再见。", f"谢谢你陪我聊{like}，{leaving}。", f"{leaving}，下次再聊{like}。"]
        )
        return asked, "", f"好的，{GOODBYE[leaving]}"
    return (
        rng.choice([f"{hello}，你会{like}吗？", f"{hello}！你喜欢{like}吗？"]),
        "",
        (f"{hello}！我是一个语言模型，不能真的去{like}，但是可以和你聊聊{like}。"),
    )


CATEGORIES = {"zh->en": to_english, "en->zh": to_chinese, "code": code, "questions": question, "chat": chat}


def make_general(seed=SEED):
    """Return the rows; no two have the same prompt."""
    rng = random.Random(seed)
    with open(HERE / "forgetting.json", encoding="utf-8") as file:
        suite = [json.loads(line) for line in file]
    seen = {row["instruction"] + row["input"] for row in suite}
    said = {row["output"] for row in suite}  # not the sentence in another direction either
    rows = []
    for category, make in CATEGORIES.items():
        count = 0
        while count < ROWS:
            instruction, text, output = make(rng)
            if instruction + text not in seen and not {text, output} & said:
                seen.add(instruction + text)
                rows.append({"instruction": instruction, "input": text, "output": output, "category": category})
                count += 1
    rng.shuffle(rows)
    return rows


def main():
    with open(HERE / "general.json", "w", encoding="utf-8", newline="\n") as file:
        for row in make_general():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
