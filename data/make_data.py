"""Make the four example data sets of this folder.

    python data/make_data.py            # rewrites spo_0, spo_1, d2q_0 and d2q_1.json
    python data/make_data.py --check    # only checks the files that are there
    python data/make_data.py --more 6000 FILE   # writes more spo rows, none of them in spo_1

Two tasks are made, both in the row format that the training scripts read
(JSON lines with the keys "instruction", "input" and "output"):

* ``spo``  vehicle-fault triple extraction: a workshop note in, triples out;
* ``d2q``  question generation: a short document in, one question out.

All text is put together from the word lists below with a fixed seed, so a second
run writes the same bytes. Only the standard library is used.
"""

import json
import random
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from tuning.arguments.parser import SWITCH, Integer, Parser, answer_early  # noqa: E402

SEED = 20230406

SPO_TRAIN, SPO_TEST = 1500, 100
D2Q_TRAIN, D2Q_TEST = 1500, 100

# The "\\n" below is a backslash and the letter n: the model is told how triples are
# separated, while the output itself holds real newlines.
SPO_INSTRUCTION = (
    "你现在是一个信息抽取模型，请你帮我抽取出关系内容为"
    '"性能故障", "部件故障", "组成"和 "检测工具"的相关三元组，'
    '三元组内部用"_"连接，三元组之间用\\n分割。文本：'
)
D2Q_INSTRUCTION = "你现在是一个问题生成模型，请根据下面文档生成一个问题，文档："

PERF, PART, COMP, TOOL = "性能故障", "部件故障", "组成", "检测工具"

# --------------------------------------------------------------------------------------
# spo: what can go wrong in a vehicle
# --------------------------------------------------------------------------------------
# One block for each assembly:
#   # name
#   ! subject: symptoms                  -> 性能故障 (how the vehicle or assembly performs)
#   - part: faults                       -> 部件故障 (state in which a part is found)
#   ? tool: what is measured with it     -> 检测工具
# A fault phrase belongs to one relation only, so the words of the note decide.
CATALOGUE = """
# 冷却系统
! 发动机: 升温缓慢 水温过高
! 冷却系统: 散热不良
- 节温器: 卡滞 关闭不严
- 水泵: 漏水 异响
- 散热器: 堵塞 漏水
- 冷却风扇: 不转 异响
- 膨胀水壶: 开裂 漏水
- 水温传感器: 断路 短路
? 红外测温仪: 缸盖温度 水管温度
? 冰点仪: 冷却液冰点
# 润滑系统
! 发动机: 烧机油 机油消耗大
! 润滑系统: 供油不足
- 机油泵: 磨损 卡滞
- 机油滤清器: 堵塞 渗油
- 油底壳: 漏油 变形
- 限压阀: 卡滞 弹簧折断
- 集滤器: 堵塞 松脱
? 机油压力表: 机油压力
# 燃油系统
! 发动机: 加速无力 启动困难 油耗偏高
! 燃油系统: 供油不畅
- 燃油泵: 磨损 烧毁
- 燃油滤清器: 堵塞 渗油
- 喷油嘴: 积碳 滴漏
- 油压调节器: 膜片破裂 卡滞
- 炭罐电磁阀: 卡滞 常开
? 燃油压力表: 燃油压力 油路残压
# 点火系统
! 发动机: 怠速不稳 缺缸抖动 启动困难
! 点火系统: 点火能量不足
- 火花塞: 积碳 烧蚀
- 点火线圈: 漏电 烧毁
- 高压线: 漏电 老化
- 曲轴位置传感器: 断路 松动
- 爆震传感器: 松动 断路
? 示波器: 点火波形
? 塞尺: 火花塞间隙
# 进气系统
! 发动机: 怠速偏高 加速迟缓
! 进气系统: 进气不足
- 节气门: 积碳 卡滞
- 空气滤清器: 堵塞 脏污
- 空气流量计: 脏污 断路
- 进气歧管: 漏气 开裂
- 真空管: 脱落 漏气
? 真空表: 歧管真空度
? 烟雾检漏仪: 管路密封性
# 排气系统
! 发动机: 尾气超标 动力不足
! 排气系统: 排气不畅
- 三元催化器: 堵塞 烧结
- 氧传感器: 中毒 断路
- 消声器: 锈蚀 破损
- 排气管: 锈蚀 漏气
? 尾气分析仪: 尾气浓度
? 排气背压表: 排气背压
# 离合器
! 车辆: 起步抖动 加速打滑
! 离合器: 分离不彻底
- 离合器片: 磨损 烧蚀
- 压盘: 变形 开裂
- 分离轴承: 异响 磨损
- 分离拨叉: 变形 断裂
? 游标卡尺: 离合器片厚度
# 变速箱
! 变速箱: 换挡困难 自动脱挡 换挡顿挫
- 同步器: 磨损 异响
- 换挡拨叉: 弯曲 断裂
- 换挡拉线: 松动 断裂
- 阀体: 磨损 堵塞
- 换挡电磁阀: 卡滞 断路
? 油压表: 主油路油压
# 制动系统
! 车辆: 制动跑偏 制动距离长
! 制动系统: 制动力不足
- 制动盘: 磨损 变形
- 制动片: 偏磨 烧蚀
- 制动总泵: 漏油 皮碗老化
- 制动软管: 鼓包 老化
- 真空助力器: 漏气 膜片破裂
- 制动钳: 卡滞 异响
? 百分表: 制动盘跳动量
? 制动试验台: 制动力
# 转向系统
! 车辆: 转向沉重 行驶跑偏
! 方向盘: 回正不良 抖动严重
- 转向机: 漏油 异响
- 助力泵: 漏油 磨损
- 横拉杆球头: 松旷 磨损
- 转向柱: 异响 松旷
- 助力电机: 烧毁 异响
? 弹簧秤: 转向力
? 四轮定位仪: 前束值
# 悬架系统
! 车辆: 过坎颠簸 高速发飘
! 悬架系统: 减振效果差
- 减振器: 漏油 失效
- 螺旋弹簧: 断裂 弹力不足
- 下摆臂: 变形 胶套开裂
- 稳定杆: 变形 断裂
? 钢卷尺: 车身高度
# 启动系统
! 车辆: 无法启动
! 启动系统: 运转无力
- 起动机: 不转 烧毁
- 蓄电池: 亏电 鼓包
- 点火开关: 接触不良 触点烧蚀
- 搭铁线: 松动 锈蚀
? 万用表: 蓄电池电压
? 电流钳: 启动电流
# 充电系统
! 充电系统: 发电量不足 电压过高
- 发电机: 不发电 线圈烧毁
- 电压调节器: 损坏 失效
- 整流器: 击穿 烧毁
- 发电机皮带: 打滑 断裂
? 万用表: 发电电压
? 电流钳: 充电电流
# 空调系统
! 空调: 不制冷 出风量小
- 压缩机: 异响 不工作
- 冷凝器: 脏堵 泄漏
- 蒸发器: 泄漏 结霜
- 膨胀阀: 冰堵 卡滞
- 空调滤芯: 堵塞 发霉
? 歧管压力表: 高压侧压力
? 温度计: 出风口温度
# 电动车窗
! 车窗: 升降缓慢 升降卡顿
- 玻璃升降器: 卡滞 异响
- 升降器电机: 烧毁 不转
- 车窗开关: 接触不良 触点烧蚀
- 车窗线束: 断路 破皮
# 动力电池系统
! 车辆: 续航里程缩短 动力受限
! 动力电池系统: 充电速度慢
- 电池模组: 鼓包 过热
- 单体电芯: 漏液 压差过大
- 主正继电器: 触点粘连 触点烧蚀
- 维修开关: 接触不良 烧蚀
? 绝缘测试仪: 绝缘电阻
# 电驱动系统
! 车辆: 动力中断
! 电驱动系统: 输出扭矩不足
- 驱动电机: 异响 过热
- 电机控制器: 过热 进水
- 旋变传感器: 松动 断路
- 功率模块: 击穿 烧毁
? 毫欧表: 绕组电阻
"""

# Whole notes. Slots that carry triples: perf part comp tool; slots without: say find ok.
FRAMES = [
    "{say}{perf}，{find}{part}。",
    "{say}{perf}，{find}{comp}。",
    "{say}{perf}，{ok}，{find}{part}。",
    "{say}{perf}，{tool}。",
    "{perf}，{find}{part}。",
    "{perf}，{find}{comp}。",
    "{perf}，原因是{part}。",
    "{perf}，{ok}，{find}{comp}。",
    "{perf}，{tool}，{find}{part}。",
    "{find}{part}，{ok}。",
    "{find}{comp}，{ok}。",
    "{find}{part}和{part}。",
    "{ok}，{find}{part}。",
    "{ok}，{find}{comp}。",
    "{tool}，{find}{part}。",
    "{tool}，{find}{comp}。",
    "由于{part}，造成{perf}。",
    "{part}，导致{perf}。",
]
SAY = ["车主反映", "客户反映", "司机反映", "报修称"]
FIND = ["检查发现", "拆检发现", "最终发现", "排查后确认"]
OK = ["检查{a}正常", "{a}工作正常", "{a}未见异常", "更换{a}无效"]
TOOL_FORMS = ["用{t}测量{q}", "使用{t}检测{q}"]


def parse_catalogue(text=CATALOGUE):
    """Return a list of assemblies: dicts with name, perf, parts and tools."""
    assemblies = []
    for line in text.strip().splitlines():
        mark, rest = line[0], line[2:]
        if mark == "#":
            assemblies.append({"name": rest, "perf": [], "parts": {}, "tools": []})
            continue
        head, words = rest.split(": ")
        here = assemblies[-1]
        if mark == "-":
            here["parts"][head] = words.split()
        else:
            here["perf" if mark == "!" else "tools"] += [(head, word) for word in words.split()]
    return assemblies


class SpoNote:
    """Fills one frame with words from one assembly and collects the triples on the way."""

    def __init__(self, rng, assembly, frame):
        self.rng = rng
        self.assembly = assembly
        self.triples = []
        self.unused = rng.sample(list(assembly["parts"]), len(assembly["parts"]))  # a part is either faulty or normal
        # Left to right, so that the triples come in the order of the text.
        self.text = re.sub(r"{(\w+)}", lambda m: getattr(self, m.group(1))(), frame)

    def add(self, *triple):
        self.triples.append("_".join(triple))

    def say(self):
        return self.rng.choice(SAY)

    def find(self):
        return self.rng.choice(FIND)

    def ok(self):
        return self.rng.choice(OK).format(a=self.unused.pop())

    def perf(self):
        subject, symptom = self.rng.choice(self.assembly["perf"])
        self.add(subject, PERF, symptom)
        return subject + symptom

    def part(self):
        part = self.unused.pop()
        fault = self.rng.choice(self.assembly["parts"][part])
        self.add(part, PART, fault)
        return part + fault

    def comp(self):
        self.add(self.assembly["name"], COMP, self.unused[-1])
        return self.assembly["name"] + "的" + self.part()

    def tool(self):
        tool, quantity = self.rng.choice(self.assembly["tools"])
        self.add(tool, TOOL, quantity)
        return self.rng.choice(TOOL_FORMS).format(t=tool, q=quantity)


def make_spo(seed=SEED, train=SPO_TRAIN, test=SPO_TEST):
    """Return (train, test) rows of the triple extraction task."""
    rng = random.Random(seed)
    assemblies = parse_catalogue()
    # Large assemblies are picked more often, so that parts occur about equally often.
    weights = [len(assembly["parts"]) for assembly in assemblies]
    rows, seen = [], set()
    while len(rows) < train + test:
        assembly, frame = rng.choices(assemblies, weights)[0], rng.choice(FRAMES)
        if "{tool}" in frame and not assembly["tools"]:
            continue
        note = SpoNote(rng, assembly, frame)
        # A row of the same frame with the same triples would be a near copy: never made twice,
        # hence no test row is a training row in other clothes.
        key = (frame, tuple(note.triples))
        if key in seen:
            continue
        seen.add(key)
        rows.append({"instruction": SPO_INSTRUCTION, "input": note.text, "output": "\n".join(note.triples)})
    return rows[:train], rows[train:]


# --------------------------------------------------------------------------------------
# d2q: short documents and the questions they answer
# --------------------------------------------------------------------------------------
# A topic has documents put together from facts. Each fact has a sentence (variants split
# by " / ") and questions; "{n}" is the name of the thing. Facts of FIXED topics belong to
# the thing and are true for it in a general way; facts of FREE topics are about invented
# places, offices and devices, and are drawn at random.
FIXED_FORMS = {
    "药材": {
        "味": ("{n}味{v} / {n}的味道{v}", "{n}是什么味道的？ / {n}尝起来味道如何？ / {n}的味道有什么特点？"),
        "部位": ("通常取{v}入药 / 入药部位是{v}", "{n}的入药部位是什么？ / {n}用哪个部位入药？ / {n}取什么部位入药？"),
        "采": (
            "一般在{v}采收 / {v}是采收的时节",
            "{n}什么时候采收？ / {n}的采收季节是什么时候？ / 采收{n}在什么季节？",
        ),
        "用": (
            "民间常用来{v} / 日常生活中多用来{v}",
            "{n}在民间有什么用途？ / {n}常用来做什么？ / 日常生活中{n}有什么用法？",
        ),
        "存": ("存放时应{v} / 储存时要{v}", "{n}应该怎样存放？ / 如何保存{n}？ / 储存{n}要注意什么？"),
    },
    "菜": {
        "料": (
            "主要食材是{v} / 做这道菜需要准备{v}",
            "{n}的主要食材有哪些？ / 做{n}需要准备什么食材？ / {n}用什么做？",
        ),
        "法": ("做法是{v} / 制作时{v}", "{n}怎么做？ / {n}的做法是什么？ / 如何制作{n}？"),
        "火": ("火候上要{v} / 烹制时{v}", "做{n}要怎样掌握火候？ / {n}的火候有什么要求？ / 烹制{n}用多大的火？"),
        "味": ("成菜{v} / 做好后口感{v}", "{n}的口感怎么样？ / {n}有什么风味特点？ / {n}吃起来口感如何？"),
        "诀": (
            "小窍门是{v} / 想做得好吃，可以{v}",
            "做{n}有什么小窍门？ / 怎样把{n}做得更好吃？ / {n}好吃的诀窍是什么？",
        ),
    },
    "花草": {
        "光": (
            "{n}{v} / 光照方面，{n}{v}",
            "{n}对光照有什么要求？ / 养{n}需要怎样的光照？ / {n}喜欢什么样的光照环境？",
        ),
        "水": ("浇水要{v} / 浇水方面应{v}", "{n}应该怎样浇水？ / 养{n}如何浇水？ / 给{n}浇水要注意什么？"),
        "土": ("适合{v} / 栽种宜选{v}", "{n}适合用什么土栽种？ / 种{n}选什么样的土壤？ / {n}对土壤有什么要求？"),
        "繁": ("多用{v}的方法繁殖 / 可以通过{v}繁殖", "{n}怎么繁殖？ / {n}用什么方法繁殖？ / 繁殖{n}有什么办法？"),
        "期": ("花期一般在{v} / {v}是开花的时节", "{n}什么时候开花？ / {n}的花期在什么时候？ / {n}在哪个季节开花？"),
    },
    "运动": {
        "练": (
            "{n}主要锻炼{v} / 练习{n}能锻炼{v}",
            "{n}主要锻炼什么？ / 练习{n}有什么好处？ / {n}能锻炼身体的哪些方面？",
        ),
        "具": ("需要准备{v} / 所需装备有{v}", "{n}需要哪些装备？ / 进行{n}要准备什么？ / 参加{n}需要带什么装备？"),
        "地": (
            "适合在{v}进行 / 一般选择在{v}开展",
            "{n}适合在哪里进行？ / {n}一般选择什么场地？ / 在什么地方进行{n}比较合适？",
        ),
        "忌": ("要注意{v} / 初学者应{v}", "{n}要注意什么？ / 初学{n}有哪些注意事项？ / 进行{n}时应注意哪些问题？"),
        "人": ("适合{v} / 这项运动比较适合{v}", "{n}适合哪些人？ / 什么样的人适合{n}？ / 哪些人群可以参加{n}？"),
    },
    "家务": {
        "因": ("{n}多半是因为{v} / 造成{n}的原因常常是{v}", "{n}的原因是什么？ / 为什么会{n}？ / {n}是什么造成的？"),
        "法": ("可以{v} / 解决办法是{v}", "{n}怎么办？ / 如何解决{n}的问题？ / 遇到{n}应该怎么处理？"),
        "防": ("平时应{v} / 要想避免，平时可以{v}", "怎样预防{n}？ / 如何避免{n}？ / 平时怎么做可以防止{n}？"),
        "错": ("不要{v} / 处理时切忌{v}", "{n}时不要做什么？ / 处理{n}有什么禁忌？ / 遇到{n}时应避免哪些做法？"),
    },
    "习惯": {
        "益": ("{n}有助于{v} / 坚持{n}可以帮助{v}", "{n}有什么好处？ / 坚持{n}有什么作用？ / 为什么提倡{n}？"),
        "法": ("具体做法是{v} / 刚开始时可以{v}", "怎样做到{n}？ / {n}应该怎么做？ / 如何养成{n}的习惯？"),
        "时": (
            "最好安排在{v} / 合适的时间是{v}",
            "{n}安排在什么时间最好？ / 什么时候适合{n}？ / {n}的最佳时间是什么时候？",
        ),
        "误": (
            "常见的误区是{v} / 不少人的误区是{v}",
            "{n}有什么常见误区？ / 很多人在{n}上有什么误区？ / 关于{n}，常见的错误是什么？",
        ),
    },
}
FIXED_INTROS = {
    "药材": ["{n}是一种常见的药材", "{n}在中药铺里很常见", "说起{n}，许多人并不陌生"],
    "菜": ["{n}是一道家常菜", "{n}很受大家欢迎", "不少家庭都会做{n}"],
    "花草": ["{n}是常见的观赏植物", "许多人喜欢在家里养{n}", "{n}很适合家庭栽培"],
    "运动": ["{n}是一项大众运动", "近年来{n}越来越受欢迎", "喜欢{n}的人越来越多"],
    "家务": ["{n}是家里常遇到的问题", "很多家庭都遇到过{n}", "{n}让不少人头疼"],
    "习惯": ["{n}是一种健康的生活方式", "很多人正在尝试{n}", "{n}看似简单，却不容易坚持"],
}
# Name, then the facts in the order of FIXED_FORMS, split by " | ".
FIXED_FACTS = {
    "药材": """
薄荷 | 辛，气味清凉 | 干燥的地上部分 | 夏秋两季 | 泡茶、做凉糕 | 密封并避光
金银花 | 甘，气味清香 | 干燥的花蕾 | 初夏花开之前 | 泡水代茶饮 | 放在干燥处并防虫蛀
菊花 | 甘中带苦 | 干燥的头状花序 | 秋末冬初 | 泡茶或做枕芯 | 密封防潮
枸杞 | 甘甜 | 成熟的果实 | 夏秋果实变红时 | 煲汤、煮粥 | 放入冰箱冷藏或密封
陈皮 | 苦而辛，有柑香 | 晒干的成熟果皮 | 秋冬橘子成熟后 | 煮水和炖肉去腥 | 置于通风干燥处
生姜 | 辛辣 | 新鲜的根茎 | 秋冬两季 | 煮姜茶驱寒 | 埋在湿沙中或放阴凉处
山楂 | 酸甜 | 成熟的果实 | 秋季果实成熟时 | 做果丹皮和泡水 | 切片晒干后密封
百合 | 微苦后甘 | 肉质的鳞叶 | 秋季地上部分枯萎后 | 煮粥、做甜品 | 防潮并避免压碎
艾叶 | 苦辛，香气浓 | 干燥的叶子 | 端午前后 | 泡脚和熏香 | 放在通风处，避免受潮
桂圆 | 甘甜 | 果肉 | 夏秋果实成熟时 | 煮甜汤和泡茶 | 去壳后密封冷藏
莲子 | 甘而微涩 | 成熟的种子 | 秋季莲蓬成熟时 | 熬粥、炖汤 | 干燥密封，注意防虫
蒲公英 | 微苦 | 干燥的全草 | 春季至秋季花初开时 | 凉拌、泡茶 | 晾干后放干燥处
""",
    "菜": """
番茄炒蛋 | 番茄和鸡蛋 | 先炒鸡蛋盛出，再炒番茄出汁后合炒 | 大火快炒 | 酸甜开胃、鸡蛋松软 | 打蛋时加少许清水
红烧茄子 | 茄子、蒜和青椒 | 茄子煎软后加酱汁焖入味 | 先中火煎后小火焖 | 软糯鲜香 | 先用盐腌茄子再挤干水分
酸辣土豆丝 | 土豆、干辣椒和醋 | 土豆切丝泡水，热油下锅翻炒 | 全程用大火 | 爽脆酸辣 | 多洗几遍去掉淀粉
清蒸鲈鱼 | 鲈鱼、葱和姜 | 鱼身划刀铺姜片，蒸熟后淋热油 | 水开后大火蒸 | 鲜嫩不腥 | 蒸好后倒掉盘中的汤水
麻婆豆腐 | 嫩豆腐、肉末和豆瓣酱 | 炒香肉末和豆瓣酱后下豆腐烧入味 | 用小火慢烧 | 麻辣鲜烫 | 豆腐先用盐水焯一下
冬瓜排骨汤 | 冬瓜和排骨 | 排骨焯水后炖烂，再放冬瓜煮熟 | 大火烧开后转小火 | 清淡鲜甜 | 出锅前再放盐
凉拌黄瓜 | 黄瓜、蒜末和香醋 | 黄瓜拍碎后加调料拌匀 | 注意不必开火，现拌现吃 | 清脆爽口 | 先撒盐腌出水分
葱油拌面 | 面条、小葱和酱油 | 小葱炸出香味后与酱油一起拌面 | 用小火慢熬葱油 | 葱香浓郁 | 葱白先下锅、葱叶后下
土豆炖牛肉 | 牛腩、土豆和洋葱 | 牛肉炒香加水炖软，再放土豆 | 小火慢炖 | 酥烂入味 | 用热水炖，中途不加冷水
蒜蓉西兰花 | 西兰花和蒜 | 西兰花焯水后与蒜末同炒 | 用大火快速翻炒 | 清爽脆嫩 | 焯水时加几滴油
皮蛋瘦肉粥 | 大米、皮蛋和瘦肉 | 米粥煮开花后放肉丝和皮蛋 | 小火慢熬并不时搅动 | 绵滑咸鲜 | 大米提前拌油浸泡
香菇炖鸡 | 鸡块、干香菇和姜 | 鸡块炒香后与泡发的香菇同炖 | 先大火后小火 | 香浓肉嫩 | 泡香菇的水一起倒入锅中
""",
    "花草": """
天竺葵 | 喜光，夏季需适当遮阴 | 干透再浇透 | 疏松的沙质土 | 扦插和播种 | 春季到初夏
君子兰 | 喜半阴，忌强光直射 | 少量多次，避免浇入叶心 | 含腐殖质的微酸性土 | 分株和播种 | 冬末到春季
茉莉花 | 喜充足的阳光 | 勤浇，夏季早晚各一次 | 肥沃的微酸性土 | 扦插和压条 | 初夏到秋季
月季 | 喜阳，每天要晒足太阳 | 干透再浇 | 排水良好的肥沃土壤 | 扦插和嫁接 | 春季到秋季
吊兰 | 喜明亮的散射光 | 保持盆土微湿 | 疏松的沙质土 | 分株 | 春夏之间
长寿花 | 喜光，短日照下开花 | 宁干勿湿 | 掺沙的腐叶土 | 茎插和叶插 | 冬季到次年春季
栀子花 | 喜光，但怕夏季暴晒 | 用放置过的水，保持湿润 | 酸性土壤 | 扦插和水培 | 夏季
蝴蝶兰 | 喜散射光，不耐暴晒 | 等水苔干了再浇透 | 水苔或树皮 | 分株和组织培养 | 春节前后
芦荟 | 喜阳，也耐半阴 | 少浇，冬季控水 | 排水好的沙土 | 分株 | 夏秋之间
水仙 | 喜阳光充足的环境 | 勤换清水 | 清水水培或沙土 | 分球 | 冬末春初
杜鹃 | 喜半阴，怕烈日 | 多喷水，保持空气湿润 | 酸性腐叶土 | 扦插 | 春季
薰衣草 | 喜全日照 | 少浇，忌积水 | 偏碱性的沙质土 | 播种和扦插 | 初夏
""",
    "运动": """
慢跑 | 心肺功能和耐力 | 一双合脚的跑鞋 | 公园步道或操场 | 跑前热身、跑后拉伸 | 大多数健康成年人
游泳 | 全身肌肉和肺活量 | 泳衣、泳帽和泳镜 | 有救生员的泳池 | 下水前做好热身，不空腹游泳 | 关节不便负重的人
羽毛球 | 反应能力和手臂力量 | 球拍、羽毛球和软底鞋 | 无风的室内球馆 | 活动好手腕和脚踝 | 喜欢双人配合的青少年
太极拳 | 平衡能力和柔韧性 | 宽松的衣服和平底鞋 | 安静平坦的空地 | 动作放慢、呼吸均匀 | 中老年人
跳绳 | 协调性和小腿力量 | 一根长短合适的绳子 | 平整有弹性的地面 | 前脚掌着地，膝盖微屈 | 时间紧张的上班族和学生
登山 | 腿部力量和意志力 | 登山鞋、手杖和饮水 | 有标识的山路 | 结伴而行，留意天气 | 喜欢户外的人
骑行 | 下肢力量和心肺功能 | 头盔、自行车和手套 | 专用的自行车道 | 调好坐垫高度，遵守交通规则 | 体重偏大、想保护膝盖的人
瑜伽 | 柔韧性和专注力 | 瑜伽垫和舒适的衣服 | 通风安静的房间 | 量力而行，不强求难度 | 久坐的办公人员
乒乓球 | 眼手配合和反应速度 | 球拍和乒乓球 | 社区活动室或体育馆 | 注意脚下移动，避免扭伤 | 各个年龄段的人
广场舞 | 节奏感和身体协调 | 舒适的舞鞋和音响 | 社区广场 | 控制音量，避免影响邻居 | 退休在家的中老年人
""",
    "家务": """
水龙头滴水 | 密封垫片老化 | 关掉总阀后更换垫片 | 轻开轻关，定期检查 | 用蛮力拧紧把手
下水道有异味 | 存水弯里的水干了 | 倒入清水或更换防臭地漏 | 每周冲洗一次管道 | 混用不同的清洁剂
玻璃有水渍 | 水中的矿物质残留 | 用稀释的白醋擦拭 | 洗完后及时刮干水分 | 用钢丝球硬擦
衣柜发霉 | 通风不良、空气潮湿 | 清空后用酒精擦拭并晾干 | 放干燥剂并经常开门通风 | 把没干透的衣服放进去
锅底烧糊 | 火力过大或水分不足 | 加水和小苏打煮开后再刷 | 煮食时常翻动并看好火 | 马上用冷水冲热锅
白鞋发黄 | 洗涤剂没有冲净 | 裹上白纸巾后阴干 | 彻底漂洗干净 | 放在太阳下暴晒
冰箱结霜 | 频繁开门带入湿气 | 断电后让冰霜自然融化 | 把食物放凉加盖后再放入 | 用尖锐的刀具铲冰
毛衣起球 | 摩擦过多 | 用去球器轻轻剪掉 | 翻面放入洗衣袋清洗 | 用手直接拉扯
木地板有划痕 | 移动家具时拖拽 | 用同色的修补蜡填平 | 给桌椅脚贴上软垫 | 用湿拖把反复擦
厨房油污难擦 | 油烟长时间堆积 | 喷上碱水静置后再擦 | 做完饭趁热擦拭灶台 | 用干抹布硬蹭
热水壶有水垢 | 水质偏硬 | 加柠檬片煮开后浸泡 | 用完及时倒净余水 | 用铁器刮内壁
毛巾变硬 | 洗涤剂和水垢残留 | 用温水加白醋浸泡 | 勤洗并充分晾干 | 长期放在潮湿的浴室
""",
    "习惯": """
早睡早起 | 保持白天精神充沛 | 每天提前一刻钟上床 | 晚上十点到十一点之间 | 周末补觉到中午
饭后散步 | 放松身心、促进消化 | 慢走二三十分钟 | 饭后休息半小时之后 | 吃完马上快走
多喝白开水 | 补充身体流失的水分 | 在桌上放一个水杯，小口慢饮 | 起床后和两餐之间 | 口渴了才猛喝一大杯
规律吃早餐 | 为上午的学习工作提供能量 | 前一晚备好食材 | 起床后一小时左右 | 用饼干零食代替正餐
坐姿端正 | 减轻颈肩的负担 | 调整桌椅高度，背部贴住椅背 | 每次学习或办公时 | 以为坐得直就可以久坐不动
远眺护眼 | 缓解眼睛疲劳 | 看一看窗外远处的树木 | 用眼四十分钟以后 | 用看手机代替休息
细嚼慢咽 | 增加饱腹感 | 每口多嚼几下，吃饭时不看屏幕 | 每一次正餐 | 用汤水把饭送下去
睡前阅读 | 让大脑安静下来 | 选轻松的纸质书读几页 | 睡前半小时 | 躺着用手机看小说
工间拉伸 | 缓解肌肉僵硬 | 站起来活动肩颈和手腕 | 每工作一小时之后 | 认为动作越用力越好
写日记 | 整理思绪、提高表达能力 | 每天先写三句话 | 晚饭后的安静时间 | 认为一定要写得很长
开窗通风 | 保持室内空气新鲜 | 打开对着的两扇窗，让空气流动 | 上午太阳出来以后 | 天一冷就整天不开窗
午间小睡 | 恢复下午的精力 | 找个安静处躺下或靠着休息 | 午饭后半小时 | 一觉睡两三个小时
""",
}

# FREE topics: a name is drawn from two lists, a fact value from its list of choices.
FREE = {
    "景区": {
        "names": (
            "云溪 青岚 白鹭 松涛 望月 荷香 石桥 柳岸 金沙 翠屏",
            "植物园 湿地公园 古镇 森林公园 生态茶园 温泉山庄",
        ),
        "intros": ["{n}是周末出游的好去处", "{n}位于城区近郊", "{n}每年接待不少游客"],
        "facts": [
            (
                "每天{v}开放 / 开放时间为{v}",
                "8:00至17:00,8:30至17:30,9:00至16:30,7:30至18:00",
                "{n}的开放时间是几点？ / {n}几点开门？ / {n}每天什么时候开放？",
            ),
            (
                "成人门票{v}一张 / 门票价格为{v}",
                "20元,30元,45元,50元,60元",
                "{n}的门票多少钱？ / 去{n}门票是多少？ / {n}票价是多少？",
            ),
            (
                "可乘{v}到达 / 坐{v}可以直达",
                "3路公交车,12路公交车,地铁2号线,旅游专线,地铁5号线",
                "去{n}坐什么车？ / 怎么去{n}？ / 到{n}可以乘坐什么交通工具？",
            ),
            (
                "最适合游览的季节是{v} / {v}景色最美",
                "春季,夏季,秋季,初冬",
                "什么季节去{n}最好？ / {n}哪个季节景色最美？ / 游览{n}的最佳季节是什么时候？",
            ),
            (
                "游览大约需要{v} / 走完全程约{v}",
                "两小时,三小时,半天,一天",
                "游览{n}需要多长时间？ / 逛完{n}要多久？ / 去{n}玩大约要花多少时间？",
            ),
            (
                "{v}可以免费进入 / 对{v}免收门票",
                "身高一米二以下的儿童,七十岁以上的老人,现役军人,持证的教师",
                "哪些人可以免费进入{n}？ / {n}对谁免门票？ / 什么人去{n}不用买票？",
            ),
        ],
    },
    "办事": {
        "names": (
            "城东区 河西区 新湖区 南山街道 北苑街道 柳林镇 清泉镇 桥头镇",
            "居住证办理 老年卡申领 图书借阅证办理 公租房申请 个体户登记 户口迁移",
        ),
        "intros": ["关于{n}，窗口作了说明", "{n}已经开通网上预约", "居民经常咨询{n}的有关事项"],
        "facts": [
            (
                "需要携带{v} / 应当提交{v}",
                "身份证和照片,户口簿原件,身份证和户口簿,申请表和身份证复印件",
                "{n}需要什么材料？ / {n}要带哪些证件？ / 办{n}应提交哪些材料？",
            ),
            (
                "{v}个工作日内办结 / 办理时限为{v}个工作日",
                "3,5,7,10,15",
                "{n}多久能办好？ / {n}需要几个工作日？ / {n}的办理时限是多长？",
            ),
            (
                "办理地点在{v} / 申请人到{v}办理",
                "便民服务中心一楼,政务大厅3号窗口,社区服务站,街道办事处二楼",
                "{n}在哪里办？ / {n}的办理地点在什么地方？ / 去哪里进行{n}？",
            ),
            (
                "{v}受理业务 / 受理时间为{v}",
                "周一至周五上午,工作日9:00至17:00,周二和周四全天,周六上午",
                "{n}什么时间受理？ / 什么时候可以去进行{n}？ / {n}的受理时间是什么时候？",
            ),
            (
                "{v} / 费用方面，{v}",
                "不收取任何费用,只收工本费10元,首次办理免费,目前免收手续费",
                "{n}要收费吗？ / {n}的费用是多少？ / {n}需要交多少钱？",
            ),
            (
                "如有疑问，可{v} / 咨询时可{v}",
                "拨打窗口电话,在公众号留言,到服务台询问,联系社区网格员",
                "{n}有疑问怎么咨询？ / 如何咨询{n}的问题？ / 对{n}有疑问该找谁？",
            ),
        ],
    },
    "电器": {
        "names": (
            "听雨牌 微光牌 小禾牌 晨露牌 暖檐牌 竹影牌 石榴牌 云朵牌",
            "电饭煲 扫地机 加湿器 空气净化器 洗碗机 电暖器 除湿机 破壁机",
        ),
        "intros": ["{n}适合三口之家使用", "{n}的说明书写得很详细", "{n}是今年推出的新款"],
        "facts": [
            (
                "额定功率为{v}瓦 / 功率是{v}瓦",
                "300,450,600,750,800,900",
                "{n}的功率是多少？ / {n}的额定功率有多大？ / {n}是多少瓦的？",
            ),
            (
                "保修期为{v} / 整机保修{v}",
                "一年,两年,三年,十八个月",
                "{n}的保修期是多久？ / {n}保修多长时间？ / {n}整机保修几年？",
            ),
            (
                "清洁时应{v} / 日常清洗要{v}",
                "先拔掉电源再擦拭,用软布蘸温水擦,等机身冷却后再擦,避免水流入底座",
                "怎样清洁{n}？ / 清洗{n}要注意什么？ / {n}日常如何清洁？",
            ),
            (
                "指示灯{v} / 面板上的指示灯{v}",
                "闪红灯表示出现故障,变黄表示需要清洁,常亮蓝灯表示正在工作,快速闪烁表示机器没有放平",
                "{n}的指示灯代表什么意思？ / {n}的指示灯有什么含义？ / {n}指示灯亮起说明什么？",
            ),
            (
                "最好放在{v} / 摆放时应选择{v}",
                "平稳的台面,通风干燥的地方,离墙二十厘米处,远离热源的位置",
                "{n}应该放在哪里？ / {n}摆放在什么位置合适？ / 摆放{n}有什么要求？",
            ),
            (
                "长按{v}可以恢复出厂设置 / 需要重置时，长按{v}即可",
                "电源键五秒,模式键三秒,开关键十秒,定时键五秒",
                "{n}怎么恢复出厂设置？ / 如何重置{n}？ / {n}重置要按哪个键？",
            ),
        ],
    },
    "软件": {
        "names": ("砚田 苇舟 墨页 拾穗 简序 晴川 禾木 青舟", "笔记软件 表格软件 修图软件 日程软件 翻译软件 录音软件"),
        "intros": ["{n}操作简单", "{n}最近更新了新版本", "许多用户在使用{n}"],
        "facts": [
            (
                "点击{v}即可导出文件 / 导出文件时点击{v}",
                "右上角的分享按钮,菜单中的另存为,文件页的导出图标,左下角的更多按钮",
                "{n}怎么导出文件？ / 如何在{n}中导出文件？ / 用{n}导出文件要点击哪里？",
            ),
            (
                "忘记密码时可以{v} / 如果忘了密码，可{v}",
                "用注册邮箱找回,通过手机验证码重置,回答安全问题重置,联系客服核实身份",
                "{n}忘记密码怎么办？ / 如何找回{n}的密码？ / {n}怎样重置密码？",
            ),
            (
                "免费版{v} / 免费用户{v}",
                "最多保存100个文件,可用空间为2GB,只能在两台设备上登录,不能使用批量处理",
                "{n}的免费版有什么限制？ / {n}免费用户有哪些限制？ / 使用{n}免费版会受到什么限制？",
            ),
            (
                "支持{v}登录 / 用户可以{v}登录",
                "扫描二维码,用手机号,用邮箱,凭用户名和密码",
                "{n}怎么登录？ / {n}支持什么登录方式？ / 如何登录{n}？",
            ),
            (
                "开启夜间模式要进入{v} / 夜间模式在{v}中打开",
                "设置里的显示选项,个人中心的外观页,工具栏的主题菜单,系统偏好页面",
                "{n}怎么开启夜间模式？ / {n}的夜间模式在哪里打开？ / 如何在{n}中打开夜间模式？",
            ),
            (
                "数据会{v} / 软件会把数据{v}",
                "每天自动备份到云端,保存在本地文件夹,每隔十分钟自动保存,在退出时同步到服务器",
                "{n}的数据如何保存？ / {n}怎样备份数据？ / {n}会怎样处理数据？",
            ),
        ],
    },
    "课程": {
        "names": ("春晖 启明 乐学 知行 百草 小满 向阳 南风", "书法班 摄影班 烘焙课 吉他课 编程课 陶艺课 国画班 茶艺课"),
        "intros": ["{n}开始招生", "{n}面向零基础学员", "{n}受到社区居民的欢迎"],
        "facts": [
            (
                "上课时间是{v} / 固定在{v}上课",
                "周六上午,周日下午,周三晚上,周五晚上",
                "{n}什么时候上课？ / {n}的上课时间是什么时候？ / {n}每周哪天上课？",
            ),
            (
                "学费为{v}元 / 全期收费{v}元",
                "300,480,600,880,1200",
                "{n}的学费是多少？ / {n}怎么收费？ / 报名{n}要多少钱？",
            ),
            (
                "一期共{v}节课 / 全部课程有{v}节",
                "8,10,12,16,20",
                "{n}一期有几节课？ / {n}一共有多少节课？ / {n}共安排了几节课？",
            ),
            (
                "报名方式是{v} / 想参加的人可以{v}",
                "现场登记,在公众号填写表格,打电话预约,在社区微信群接龙",
                "{n}如何报名？ / {n}的报名方式是什么？ / 怎样报名参加{n}？",
            ),
            (
                "招收{v} / 招生对象为{v}",
                "八岁以上的儿童,成年学员,退休老人,中小学生",
                "{n}招收哪些学员？ / {n}的招生对象是谁？ / 哪些人可以参加{n}？",
            ),
            (
                "学员需自备{v} / 上课时请自带{v}",
                "笔记本和笔,学员证,水杯和毛巾,练习用的材料",
                "参加{n}需要自备什么？ / {n}上课要带什么？ / {n}的学员应自备哪些物品？",
            ),
        ],
    },
}
ENDS = ["", "", "", "", "以上内容供大家参考。", "了解这些，可以少走弯路。"]
INVITING = ["菜", "花草", "运动", "习惯", "景区", "课程"]  # topics that may close with an invitation
BRIDGES = ["，", "。", "；"]


def fixed_things():
    """All (topic, name, facts); a fact is a pair (sentences, questions) with the value filled in."""
    things = []
    for topic, text in FIXED_FACTS.items():
        forms = list(FIXED_FORMS[topic].values())
        for line in text.strip().splitlines():
            name, *values = line.split(" | ")
            facts = [
                ([s.format(n=name, v=value) for s in said.split(" / ")], [q.format(n=name) for q in asked.split(" / ")])
                for (said, asked), value in zip(forms, values, strict=True)
            ]
            things.append((topic, name, facts))
    return things


def free_thing(rng):
    """One invented place, office matter, device, program or course."""
    topic = rng.choice(list(FREE))
    spec = FREE[topic]
    first, second = spec["names"]
    name = rng.choice(first.split()) + rng.choice(second.split())
    facts = []
    for said, choices, asked in spec["facts"]:
        value = rng.choice(choices.split(","))
        sentences = [s.format(n=name, v=value) for s in said.split(" / ")]
        facts.append((sentences, [q.format(n=name) for q in asked.split(" / ")]))
    return topic, name, facts


def make_document(rng, fixed):
    """Return (document, list of question lists), one list for each fact told."""
    topic, name, facts = rng.choice(fixed) if rng.random() < 0.5 else free_thing(rng)
    intros = FIXED_INTROS[topic] if topic in FIXED_INTROS else FREE[topic]["intros"]
    told = rng.sample(facts, min(len(facts), rng.choice([2, 2, 3, 3, 4, 5])))
    text = rng.choice(intros).format(n=name)
    for sentences, _ in told:
        sentence = rng.choice(sentences)
        text += rng.choice(BRIDGES) + sentence
    end = rng.choice([*ENDS, "有兴趣的朋友不妨试一试。"] if topic in INVITING else ENDS)
    return text + "。" + end, [questions for _, questions in told]


def make_d2q(seed=SEED):
    """Return (train, test) rows of the question generation task."""
    rng = random.Random(seed + 1)
    fixed = fixed_things()
    seen, train, test = set(), [], []
    while len(train) < D2Q_TRAIN or len(test) < D2Q_TEST:
        text, asked = make_document(rng, fixed)
        if text in seen or not 40 <= len(text) <= 200:
            continue
        seen.add(text)
        row = {"instruction": D2Q_INSTRUCTION, "input": text}
        if len(train) < D2Q_TRAIN:
            # One document in six comes back in a second row, with a question about another fact.
            count = 2 if rng.random() < 1 / 6 and len(train) + 2 <= D2Q_TRAIN else 1
            for questions in rng.sample(asked, count):
                train.append({**row, "output": rng.choice(questions)})
        else:
            # Any told fact may be asked for: one question for each, and another wording of the first.
            output = [rng.choice(questions) for questions in asked[:3]]
            output.append(rng.choice([q for q in asked[0] if q not in output]))
            test.append({**row, "output": output})
    rng.shuffle(train)  # else the two rows of one document would be neighbours
    return train, test


# --------------------------------------------------------------------------------------
# writing and checking
# --------------------------------------------------------------------------------------
def read_rows(name):
    with open(HERE / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_rows(name, rows):
    with open(HERE / name, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def check():
    """Fail loudly if the files break a promise of the README; print their statistics."""
    files = {name: read_rows(f"{name}.json") for name in ("spo_0", "spo_1", "d2q_0", "d2q_1")}
    for task in ("spo", "d2q"):
        train, test = ({row["input"] for row in files[f"{task}_{part}"]} for part in (0, 1))
        assert not train & test, f"{task}: a test input is in the training file"
    for name, rows in files.items():
        assert all(list(row) == ["instruction", "input", "output"] for row in rows), name
        pairs = [(row["input"], json.dumps(row["output"])) for row in rows]
        assert len(set(pairs)) == len(pairs), f"{name}: a row occurs twice"
        instruction = SPO_INSTRUCTION if name.startswith("spo") else D2Q_INSTRUCTION
        assert {row["instruction"] for row in rows} == {instruction}, name
        assert (HERE / f"{name}.json").stat().st_size < 1_500_000, name
    for name in ("spo_0", "spo_1"):
        assert len({row["input"] for row in files[name]}) == len(files[name]), name
        for row in files[name]:
            triples = row["output"].split("\n")
            assert 1 <= len(triples) <= 5 and len(set(triples)) == len(triples), row
            for triple in triples:
                subject, relation, thing = triple.split("_")
                assert relation in (PERF, PART, COMP, TOOL) and subject in row["input"] and thing in row["input"], row
    for name, rows in files.items():
        lengths = [len(row["input"]) for row in rows]
        line = f"{name}: {len(rows)} rows, {len({row['input'] for row in rows})} inputs"
        line += f", input characters median {statistics.median(lengths):g}, min {min(lengths)}, max {max(lengths)}"
        if name.startswith("spo"):
            triples = [triple for row in rows for triple in row["output"].split("\n")]
            per = {r: sum(t.split("_")[1] == r for t in triples) for r in (PERF, PART, COMP, TOOL)}
            line += f", {len(triples)} triples {per}"
        elif isinstance(rows[0]["output"], list):
            line += f", {sum(len(row['output']) for row in rows)} questions"
        print(line)


def parse_args(argv=None):
    """The flags. Raises UserError: see Parser.parse_args."""
    parser = Parser(__doc__, contradictions)
    group = parser.group("what is made (default: all four files)")
    group.add_argument("--check", **SWITCH, help="check the files that are there and write nothing")
    group.add_argument("--more", nargs="+", metavar="COUNT FILE", help="write more spo rows, none of spo_1 in them")
    return parser.parse_args(argv)


def contradictions(args) -> list[str]:
    """What is wrong with --more; see Parser."""
    if args.more is None:
        return []
    wrong = ["--more and --check exclude each other"] if args.check else []
    if len(args.more) != 2:
        return [*wrong, f"--more takes a count and a file, not {' '.join(args.more)}"]
    try:
        Integer()(args.more[0])
    except ValueError as error:
        wrong.append(f"--more {args.more[0]}: {error}")
    return wrong


def main():
    answer_early(parse_args)
    args = parse_args()
    if args.more:
        count, path = args.more
        test = {row["input"] for row in read_rows("spo_1.json")}
        rows, _ = make_spo(SEED + 1, train=int(count), test=0)
        write_rows(Path(path).resolve(), [row for row in rows if row["input"] not in test])
        return
    if not args.check:
        for task, make in (("spo", make_spo), ("d2q", make_d2q)):
            for part, rows in enumerate(make()):
                write_rows(f"{task}_{part}.json", rows)
    check()


if __name__ == "__main__":
    main()
