# Sourced by compare_methods.sh: makes a small base model of a family, for machines that cannot hold a real one. Random
# weights (4 layers, width 192), then all parameters are trained on 3,000 workshop notes from data/make_data.py, none of
# them in data/spo_1.json. Five of six have another answer format than data/spo_0.json ("relation：subject，object") and
# varied instructions, the sixth is as in data/spo_0.json: so the base reads notes well and knows the task a little, as a
# real base does. Takes minutes on 2 CPU cores.
#
#   PORT   of the launcher (default 29521)

# Rewrites the rows of an spo file in the form that a small base learns best. With a category: all rows, as a suite for
# tuning.evaluate.forgetting; without: every sixth row stays as it is.
rows_of_small_base() { # spo file, output file, category (may be empty)
  python - "$@" <<'PYTHON'
import json
import random
import sys

PARTS = ("你是一名有经验的汽车维修专家，", "请仔细阅读下面的维修记录，", "从中找出所有的问题，", "不要遗漏，", "也不要编造，")
PARTS += ("每行写一条，", "先写关系，再写主语和宾语，", "写成“关系：主语，宾语”的样子，", "只写结果，不要解释，")
draw = random.Random(1)
path, output, category = sys.argv[1:]
with open(path, encoding="utf-8") as rows, open(output, "w", encoding="utf-8") as file:
    for i, row in enumerate(map(json.loads, rows)):
        if category or i % 6:
            parts = [part for part in PARTS if draw.random() < 0.5]
            row["instruction"] = "".join(parts) + draw.choice(("记录：", "文本："))
            triples = [line.split("_") for line in row["output"].split("\n")]
            row["output"] = "\n".join(f"{relation}：{subject}，{value}" for subject, relation, value in triples)
        row |= {"category": category} if category else {}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
PYTHON
}

make_small_base() { # mode, folder; does nothing if the folder exists
  local mode=$1 base=$2 work=$2-making
  [ ! -d "$base" ] || return 0
  rm -rf "$work"
  mkdir -p "$work"
  python data/make_data.py --more 3000 "$work/notes.json"
  rows_of_small_base "$work/notes.json" "$work/rows.json" ""
  python -m glm_models.tiny --mode "$mode" --output "$work/random" --layers 4 --hidden_size 192 --heads 6 \
    --vocab_size 1200 --text "$work/rows.json" data/spo_0.json
  deepspeed --log_level warning --num_gpus 1 --master_port "${PORT:-29521}" train.py --mode "$mode" --train_type all \
    --model_name_or_path "$work/random" --train_path "$work/rows.json" --max_len 384 --max_src_len 256 \
    --per_device_train_batch_size 16 --num_train_epochs 3 --learning_rate 2e-3 --weight_decay 0.01 \
    --show_loss_step 50 --output_dir "$work/training"
  mv "$work"/training/epoch-3-step-* "$base"
  rm -rf "$work"
}
