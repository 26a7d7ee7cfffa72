"""Forgetting: the figures against plain torch, what is refused, and an over-tuned model with replay and without."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import TEXT, enliven, write_model
from peft import LoraConfig, get_peft_model
from runs import Launched

from glm_models import MODE
from glm_models.tiny import make_tiny_checkpoint
from tuning.errors import DataError, UserError
from tuning.evaluate import forgetting
from tuning.evaluate.forgetting import common_prefix, compare, encode_suite, main, read_suite, table
from tuning.samples.encoding import encode_sample

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data"))
CPU = torch.device("cpu")
ROWS = [
    {"instruction": "问：", "input": "什么是离合器？", "output": "它连接发动机和变速箱。", "category": "questions"},
    {"instruction": "Hello world", "input": "", "output": "one two", "category": "chat"},
    {"instruction": "轮胎多久换一次？", "input": "", "output": "一般五年。", "category": "questions"},
]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


# The figures


def other_model(tiny, mode: str, folder: Path) -> str:
    """The tiny model with other weights."""
    shutil.copytree(tiny[mode], folder)
    model = MODE[mode].model.from_pretrained(folder)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    enliven(model, seed=8)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(0.8 * weights[name] + 0.2 * weight)
    write_model(model, str(folder))
    return str(folder)


def plain_distributions(folder: str, mode: str, row: dict) -> tuple[torch.Tensor, list[int]]:
    """Probabilities of the next token, float64 [answer tokens, vocabulary], and the answer's ids, one call a token."""
    tokenizer, model = MODE[mode].tokenizer.from_pretrained(folder), MODE[mode].model.from_pretrained(folder).eval()
    prompt = tokenizer.encode_prompt(row["instruction"] + row["input"])
    answer = [*tokenizer.encode_answer(row["output"]), tokenizer.eos_token_id]
    found = []
    with torch.no_grad():
        for i in range(len(answer)):
            logits = model(input_ids=torch.tensor([prompt + answer[:i]])).logits[0, -1]
            found.append(logits.double().softmax(-1))
    return torch.stack(found), answer


@pytest.mark.parametrize("mode", MODE)
def test_figures_are_those_of_plain_torch(tiny, mode, tmp_path):
    tuned = other_model(tiny, mode, tmp_path / "tuned")
    report = compare(mode, tiny[mode], tuned, write(tmp_path / "suite.json", ROWS), CPU, max_new_tokens=6)
    for category in ("questions", "chat"):
        before = after = kl = tokens = 0
        for row in (row for row in ROWS if row["category"] == category):
            p, answer = plain_distributions(tiny[mode], mode, row)
            q, _ = plain_distributions(tuned, mode, row)
            before -= sum(p[i, token].log().item() for i, token in enumerate(answer))
            after -= sum(q[i, token].log().item() for i, token in enumerate(answer))
            kl += (p * (p / q).log()).sum().item()
            tokens += len(answer)
        found = report["categories"][category]
        assert found["tokens"] == tokens
        assert found["nll_base"] == pytest.approx(before / tokens, rel=1e-4)
        assert found["nll_tuned"] == pytest.approx(after / tokens, rel=1e-4)
        assert found["kl"] == pytest.approx(kl / tokens, rel=1e-3) and kl > 0.1
        assert found["forgetting"] == pytest.approx((after - before) / tokens, abs=2e-3)
    both = [report["categories"][name] for name in ("questions", "chat")]
    for key in forgetting.SHOWN:
        assert report["overall"][key] == pytest.approx(sum(some[key] for some in both) / 2)


@pytest.mark.parametrize("mode", MODE)
def test_a_model_forgets_nothing_against_itself(tiny, mode, tmp_path):
    report = compare(mode, tiny[mode], tiny[mode], write(tmp_path / "suite.json", ROWS), CPU, max_new_tokens=6)
    for some in [*report["categories"].values(), report["overall"]]:
        assert (some["forgetting"], some["kl"], some["agree"], some["agree_prefix"]) == (0, 0, 1, 1)


def test_adapters_and_prefixes_are_results_too(tiny, load, tmp_path):
    suite = write(tmp_path / "suite.json", ROWS)
    model = load("glm3")
    model.name_or_path = tiny["glm3"]
    config = LoraConfig(r=4, target_modules=["query_key_value"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    for folder in ("merged", "prefix"):
        shutil.copytree(tiny["glm3"], tmp_path / folder)
    write_model(adapted.merge_and_unload(), str(tmp_path / "merged"))
    write_model(load("glm3", pre_seq_len=4, prefix_projection=False), str(tmp_path / "prefix"))
    settings = json.loads((tmp_path / "prefix" / "config.json").read_text())
    (tmp_path / "prefix" / "config.json").write_text(json.dumps({**settings, "pre_seq_len": 4}))
    adapter, merged, prefix = (
        compare("glm3", tiny["glm3"], str(tmp_path / name), suite, CPU, max_new_tokens=6)["overall"]
        for name in ("adapter", "merged", "prefix")
    )
    assert adapter == pytest.approx(merged, rel=1e-4) and adapter["kl"] > 0.01
    assert prefix["kl"] > 0.01 and prefix["nll_base"] == adapter["nll_base"]


def test_both_models_are_measured_in_the_type_of_the_base(tiny, tmp_path, monkeypatch):
    asked, load_result = [], forgetting.load_result

    def load(mode, folder, base, device, dtype=None, bits=0):
        asked.append(dtype)
        return load_result(mode, folder, base, device, dtype or torch.bfloat16, bits)

    monkeypatch.setattr(forgetting, "load_result", load)
    report = compare("glm2", tiny["glm2"], tiny["glm2"], write(tmp_path / "suite.json", ROWS), CPU, max_new_tokens=1)
    assert asked == [None, torch.bfloat16]
    assert report["dtype"] == "bfloat16"


@pytest.mark.parametrize("mode", MODE)
def test_greedy_answers_take_the_likeliest_token_each_time(tiny, mode, tmp_path):
    tokenizer, model = MODE[mode].tokenizer.from_pretrained(tiny[mode]), MODE[mode].model.from_pretrained(tiny[mode])
    ids = encode_sample(tokenizer, ROWS[0], 200, 100)
    found = forgetting.greedy_answer(model.eval(), tokenizer, ids, 6)
    expected = ids.prompt
    with torch.no_grad():
        for _ in range(6):
            expected.append(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax().item())
    expected = expected[len(ids.prompt) :]
    end = next((i for i, token in enumerate(expected) if token in tokenizer.stop_token_ids), None)
    assert found == expected[:end]
    model.generate = lambda input_ids, **_: torch.cat(
        (input_ids, torch.tensor([[70, 71, tokenizer.stop_token_ids[-1], 72]])), dim=1
    )
    assert forgetting.greedy_answer(model, tokenizer, ids, 6) == [70, 71]


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [([], [], 1), ([1], [], 0), ([1, 2, 3], [1, 2, 3], 1), ([1, 2, 3, 4], [1, 2, 5], 0.5), ([1, 2], [1, 2, 3, 4], 0.5)],
)
def test_agreement_from_the_start(one, other, share):
    assert common_prefix(one, other) == common_prefix(other, one) == share


# The script and its files


def test_the_script_prints_and_writes_the_same(tiny, tmp_path, capsys):
    tuned = other_model(tiny, "glm3", tmp_path / "tuned")
    rows = [{**ROWS[0], "input": "<b>|什么\n是", "output": "a|b"}, *ROWS[1:]]
    argv = ["--mode", "glm3", "--base", tiny["glm3"], "--tuned", tuned, "--suite", write(tmp_path / "s.json", rows)]
    main([*argv, "--device", "cpu", "--max_new_tokens", "4"])
    report = json.loads((tmp_path / "tuned" / "forgetting.json").read_text())
    printed = capsys.readouterr().out
    assert all(line in printed for line in table(report))
    assert re.search(r"the base's distributions take \d+ MiB in ", printed)
    assert [row["output"] for row in report["rows"]] == ["a|b", "one two", "一般五年。"]
    page = (tmp_path / "tuned" / "forgetting.md").read_text()
    assert all(line in page for line in table(report))
    assert "| 问：&lt;b>\\|什么<br>是 | a\\|b |" in page
    assert page.count("\n| questions |") == 3 and page.count("\n| chat |") == 2  # categories, and answers


def test_what_cannot_be_compared_is_one_clear_error(tiny, tmp_path, tokenizers):
    suite = write(tmp_path / "suite.json", ROWS)
    other = tmp_path / "other"
    make_tiny_checkpoint("glm3", str(other), TEXT, layers=1, hidden_size=64, vocab_size=900)
    with pytest.raises(UserError, match="different tokenizers"):
        compare("glm3", tiny["glm3"], str(other), suite, CPU, max_new_tokens=1)
    with pytest.raises(DataError, match=r"suite\.json line 1 has more than --max_length 24 tokens"):
        encode_suite(tokenizers["glm3"], suite, *read_suite(suite), 24)
    with pytest.raises(DataError, match=r"none\.json line 2: a row of a suite needs a category"):
        read_suite(write(tmp_path / "none.json", [ROWS[0], {**ROWS[1], "category": " "}]))


def test_flags_are_checked_together(tiny, tmp_path, capfd, monkeypatch):
    flags = ["--mode", "glm3", "--base", "nowhere", "--tuned", tiny["glm3"], "--output", "x.txt", "--max_length", "0"]
    with pytest.raises(UserError) as error:
        forgetting.parse_args(flags)
    for part in ("--base nowhere: no such folder", "--max_length 0: must", "--output x.txt must end in .json"):
        assert part in str(error.value)


# The data


def test_the_suite_has_each_category_and_general_rows_are_others():
    import make_general

    path = ROOT / "data" / "forgetting.json"
    _, suite = read_suite(str(path))
    counts = [sum(row["category"] == name for row in suite) for name in make_general.CATEGORIES]
    assert min(counts) >= 8 and sum(counts) == len(suite)
    made = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make_general.make_general())
    assert (ROOT / "data" / "general.json").read_text() == made
    _, general = read_suite(str(ROOT / "data" / "general.json"))
    texts = {row["instruction"] + row["input"] for row in general} | {row["output"] for row in general}
    texts |= {row["input"] for row in general if row["input"]}
    assert not texts & {text for row in suite for text in (row["instruction"] + row["input"], row["input"])}


# Over-tuned


@pytest.fixture(scope="module")
def over_tuned(tmp_path_factory):
    """Reports of a small model that was tuned far too long: without replay, and with some."""
    work = tmp_path_factory.mktemp("over-tuned")
    rows = [json.loads(line) for line in (ROOT / "data" / "general.json").read_text().splitlines()]
    general = [row for row in rows if row["category"] in ("questions", "chat")][:96]
    task = [json.loads(line) for line in (ROOT / "data" / "spo_0.json").read_text().splitlines()][:64]
    for row in task:
        row["instruction"] = "抽取："
    paths = {name: write(work / f"{name}.json", some) for name, some in (("general", general), ("task", task))}
    texts = [text for row in general + task for text in row.values()]
    make_tiny_checkpoint("glm3", str(work / "random"), texts, layers=2, hidden_size=64, heads=2)

    def train(name, base, path, epochs, rate, *more):
        argv = f"""
            --mode glm3 --train_type all --model_name_or_path {base} --train_path {path} --output_dir {work / name}
            --data_cache none --max_len 128 --max_src_len 96 --per_device_train_batch_size 8 --weight_decay 0
            --num_train_epochs {epochs} --learning_rate {rate}
        """.split()
        run = Launched([*argv, *more], 1, work / f"{name}-losses", work / f"{name}-log")
        assert run.wait() == {0: 0}, run.log.read_text()[-2000:]
        (result,) = (work / name).glob(f"epoch-{epochs}-*")
        for earlier in (work / name).glob("epoch-*"):
            if earlier != result:
                shutil.rmtree(earlier)
        return str(result)

    base = train("base", work / "random", paths["general"], 16, 1e-2)
    replay = ["--replay_path", paths["general"], "--replay_ratio", "0.2"]
    suite = write(work / "suite.json", general[::4])
    reports = {}
    for name, more in (("without", []), ("with", replay)):
        tuned = train(name, base, paths["task"], 12, 1e-2, *more)
        reports[name] = compare("glm3", base, tuned, suite, CPU, max_new_tokens=30)
        on_task = write(work / "on-task.json", [{**row, "category": "task"} for row in task[:16]])
        reports[name]["task"] = compare("glm3", base, tuned, on_task, CPU, max_new_tokens=1)["overall"]
    return reports


def test_an_over_tuned_model_scores_clearly_worse_and_replay_helps(over_tuned):
    without, some = over_tuned["without"], over_tuned["with"]
    print(*table(without), *table(some), without["task"], some["task"], sep="\n")
    for category in ("questions", "chat"):
        lost, kept = without["categories"][category], some["categories"][category]
        assert lost["forgetting"] > 1 and lost["kl"] > 1 and lost["agree"] < 0.5
        assert kept["forgetting"] < 0.5 * lost["forgetting"] and kept["kl"] < 0.5 * lost["kl"]
        assert kept["agree_prefix"] > lost["agree_prefix"]
    # neither at the cost of the task
    assert without["task"]["nll_tuned"] < 0.3 * without["task"]["nll_base"]
    assert some["task"]["nll_tuned"] < 0.3 * some["task"]["nll_base"]
