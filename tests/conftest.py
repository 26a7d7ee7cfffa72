"""Tiny checkpoints for all tests: one folder a family, made once a session from the text below, with lively weights.

"Lively": the weights are as wide as trained ones, norms are not all ones and biases not all zeros, so that a wrong
mask, position or bias moves the logits far beyond rounding.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub but those of test_hub.py, which have their own

import pytest
import torch
import transformers

from glm_models import MODE
from glm_models.checkpoint import write_weights
from glm_models.tiny import make_tiny_checkpoint

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

# Settings of make_tiny_checkpoint, a row a family.
TINY = {
    "glm": {"layers": 4, "hidden_size": 64, "heads": 4, "vocab_size": 1000},
    "glm2": {"layers": 4, "hidden_size": 64, "heads": 4, "vocab_size": 1000},
    "glm3": {"layers": 4, "hidden_size": 64, "heads": 4, "vocab_size": 1000},
}

# Files that take longest, the longest first, so that at the end no worker is left alone with one of them.
LONGEST = [
    "test_gpu_check.py",
    "test_half_precision.py",
    "test_train.py",
    "test_stops.py",
    "test_planner.py",
    "test_evaluation.py",
    "test_merge.py",
    "test_models.py",
    "test_compare_methods.py",
    "test_machines.py",
    "test_prefix.py",
    "test_native.py",
    "test_hub.py",
    "test_benchmarks.py",
    "test_fuzz.py",
    "test_forgetting.py",
]

TEXT = """\
你现在是一个信息抽取模型，请你帮我抽取出关系内容为"性能故障", "部件故障", "组成"和 "检测工具"的相关三元组，\
三元组内部用"_"连接，三元组之间用\\n分割。文本：
发动机_性能故障_怠速不稳
水泵_部件故障_漏水
变速箱_组成_离合器
诊断仪_检测工具_故障码
你现在是一个问题生成模型，请根据下面文档生成一个问题，文档：
车辆启动时仪表盘上的灯全部亮起，几秒钟以后只剩下水温灯没有熄灭。
师傅先用万用表量了电瓶电压，读数是12.6伏，说明电瓶没有问题。
拆开水泵以后发现密封圈老化，冷却液从接口处慢慢渗出来。
换上新的密封圈并加满冷却液，再次启动，水温恢复正常。
高速行驶时方向盘抖动，多半是轮胎动平衡没有做好。
刹车踏板变软，应当先检查刹车油是否缺少，再检查管路里有没有空气。
空调不制冷的原因有很多：缺少冷媒、压缩机不转、风扇损坏等等。
冬天早晨打火困难，可以检查火花塞和节气门。
倒车雷达一直响个不停，后来发现是传感器上面沾了泥。
车窗升到一半就自动下降，需要重新学习防夹功能。
雨刮器刮不干净，换一副新的雨刮片就好了。
更换机油时要记得同时更换机油滤芯。
变速箱换挡有明显的冲击，读取故障码后确定是电磁阀卡住。
左前轮异响，举升检查后确定是轴承磨损。
里程表不走字，原因是车速传感器的插头松动。
大灯不亮，先看保险丝，再看灯泡，最后看开关。
你好，请问有什么可以帮助你的吗？
今天的天气真不错，我们一起去公园散步吧。
北京是中国的首都，上海是中国最大的城市之一。
小明每天早上六点起床，先跑步，然后吃早饭。
妈妈做的红烧肉很好吃，我一口气吃了三碗饭。
图书馆里非常安静，大家都在认真看书。
晚上睡不着觉的时候，可以听一听轻音乐。
感冒了要多喝水，注意休息，必要时去看医生。
这道数学题有两种解法，你更喜欢哪一种？
春天来了，花园里的花都开了，红的黄的白的都有。
老师说：学习要靠自己，别人只能帮你一时。
他从书架上取下一本旧书，轻轻吹去上面的灰尘。
火车晚点了四十分钟，候车室里挤满了人。
我想学做菜，请告诉我怎样做西红柿炒鸡蛋。
第一步把鸡蛋打散，第二步把西红柿切成小块。
第三步热锅放油，先炒鸡蛋，再放西红柿。
最后加一点盐和糖，翻炒均匀就可以出锅了。
一年有四个季节：春、夏、秋、冬。
电脑开不了机，屏幕一片漆黑，怎么办？
请先检查电源线有没有插好，再长按电源键十秒。
手机充电很慢，可能是数据线坏了。
网络时断时续，重启路由器以后恢复正常。
打印机提示缺纸，可是纸盒里明明有纸。
这个软件需要先注册账号，然后才能使用。
密码至少要有八个字符，其中包含数字和字母。
文件太大，无法作为附件发送，请换一种方式。
会议改到星期三下午两点，地点不变。
请把下面的句子翻译成英文，并检查语法。
写一首关于月亮的短诗，四行就够了。
床前的月光照着窗外的树影，风把云吹到山的后面。
我们的产品支持七天无理由退货。
快递已经到达小区门口，请尽快去取。
医生建议他少吃油腻的食物，多吃蔬菜和水果。
如果头疼得厉害，就应该及时去医院检查。
这种药一天吃三次，一次吃两片，饭后服用。
宝宝发烧到三十八度五，先物理降温，再观察。
血压偏高的人要少吃盐，保持心情平和。
膝盖疼痛多与运动过量有关，应当适当休息。
问：什么是离合器？答：它连接发动机和变速箱。
问：轮胎多久换一次？答：一般五年或者六万公里。
[Round 0]
[Round 1]
[Round 2]
问：
答：
查询天气的工具叫做 get_weather，参数是城市的名字。
现在的时间是上午九点一刻，气温二十五度。
计算 3 加 4 乘 5 等于多少？先乘后加，结果是 23。
圆的面积等于半径的平方乘以圆周率。
列表里一共有 7 个元素，下标从 0 开始。
函数没有返回值的时候，返回的就是空。
循环里忘记更新变量，程序就停不下来。
代码写完以后一定要测试，测试通过才能提交。
训练数据越干净，模型学到的东西就越可靠。
学习率太大，损失就会变成无穷大。
The engine starts but stops again after a few seconds.
Please check the battery before you replace the starter.
A loose connector is often the reason for a strange noise.
The water pump leaks and the temperature is too high.
Use a multimeter to measure the voltage of the battery.
He asked the driver when the problem had appeared first.
It rains in the morning and the sun shines in the afternoon.
How can I help you today? Tell me about the problem.
Hello world, this is a small text for a small model.
We write short sentences, so that the pieces stay short.
def add(first, second): return first + second
for index in range(10): print(index, index * 2)
tool_call(city="Beijing", days=3)
import os and import json are at the top of the file.
{"name": "get_weather", "parameters": {"city": "string"}}
x = [1, 2, 3]; y = (4, 5, 6); z = x + list(y)
if a < b and c >= d: a, b = b, a
user, assistant, system and observation are roles.
Numbers: 0 1 2 3 4 5 6 7 8 9, 10% of 2000 is 200.
Questions? Answers! Colons: semicolons; dots... dashes - done.
<user> writes | pipes | and brackets [like] {these} (often)
He said "yes" and she said 'no', that was all.
See /usr/share/doc or C:\\temp for more, and mail me@example.com.
ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz
~ ` @ # $ ^ & * _ = + \\ / €
""".splitlines()


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@torch.no_grad()
def enliven(model: torch.nn.Module, seed: int = 7) -> None:
    """New random weights: see the module's docstring."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("final_layernorm.weight"):
            weight.copy_(noise)  # not about one: tied to its input, the model would repeat the last token for ever
        elif "norm" in name and name.endswith("weight"):
            weight.copy_(1 + 0.25 * noise)
        elif name.endswith("bias"):
            weight.copy_(0.2 * noise)
        elif name.endswith("embedding.weight"):  # of a prefix encoder
            weight.copy_(noise)
        else:
            weight.copy_(noise * 1.5 / weight.shape[1] ** 0.5)


def write_model(model: torch.nn.Module, folder: str, **kwargs) -> None:
    """All tensors of an official weights file; kwargs go to write_weights."""
    tensors = {**model.state_dict(), **model.official_buffers()}
    write_weights(folder, tensors.items(), sum(t.numel() * t.element_size() for t in tensors.values()), **kwargs)


def make_lively_checkpoint(mode: str, folder: str, **settings) -> None:
    """A tiny checkpoint whose weights are large enough to tell models apart."""
    make_tiny_checkpoint(mode, folder, TEXT, **settings)
    model = MODE[mode].model.from_pretrained(folder)
    enliven(model)
    write_model(model, folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny[mode]: a checkpoint folder; never written to by tests."""
    folders = {}
    for mode, settings in TINY.items():
        folder = str(tmp_path_factory.mktemp("tiny") / mode)
        make_lively_checkpoint(mode, folder, **settings)
        folders[mode] = folder
    return folders


@pytest.fixture(scope="session")
def tokenizers(tiny):
    """tokenizers[mode]: the tokenizer of the tiny checkpoint; do not change."""
    return {mode: MODE[mode].tokenizer.from_pretrained(folder) for mode, folder in tiny.items()}


@pytest.fixture
def load(tiny):
    """load(mode, **config): a fresh model of the tiny checkpoint in eval mode, config keys changed.

    A prefix encoder, where config asks for one, is made lively too.
    """

    def load_model(mode, **config):
        config = MODE[mode].config.from_pretrained(tiny[mode], **config)
        model = MODE[mode].model.from_pretrained(tiny[mode], config=config).eval()
        if config.pre_seq_len is not None:
            enliven(model.transformer.prefix_encoder)
        return model

    return load_model
