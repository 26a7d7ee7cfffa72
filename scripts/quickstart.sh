#!/usr/bin/env bash
# A whole run on this machine, on a CPU if there is no GPU: makes an environment and a small ChatGLM3 that knows workshop
# notes a little, tunes it by LoRA with DeepSpeed, merges, answers rows that are not in the training data, and writes a
# report with curves and with answers beside references.
#
#   VENV   folder of the virtual environment, made if missing (default .venv)
#   PYTHON the Python that makes it      (default python3; 3.11 or newer)
#   PORT   of the launcher               (default 29521)
#   WORK   folder for models and results (default output-quickstart); a small base in it is reused
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -gt 0 ]; then # without this, a typing error would start four minutes of work
  sed -n '2,/^set/s/^# \{0,1\}//p' scripts/quickstart.sh
  case $1 in -h | --help) exit 0 ;; esac
  echo "error: quickstart.sh takes no arguments, only the variables above" >&2
  exit 2
fi
source scripts/environment.sh
make_environment requirements.txt
work=${WORK:-output-quickstart}
base=$work/base
launcher=(deepspeed --log_level warning --num_gpus 1 --master_port "${PORT:-29521}")
common=(--mode glm3 --max_len 384 --max_src_len 256 --weight_decay 0.01 --show_loss_step 50)

if [ ! -d "$base" ]; then
  echo "== 1/5 a small base: random weights, then trained on workshop notes (none of them in data/spo_1.json)"
  rm -rf "$work/random" "$work/base-training"
  mkdir -p "$work"
  python data/make_data.py --more 3000 "$work/notes.json"
  python -m glm_models.tiny --mode glm3 --output "$work/random" --layers 4 --hidden_size 192 --heads 6 --vocab_size 1000 \
    --text "$work/notes.json" data/spo_0.json
  "${launcher[@]}" train.py "${common[@]}" --train_type all --model_name_or_path "$work/random" \
    --train_path "$work/notes.json" --per_device_train_batch_size 16 --num_train_epochs 3 --learning_rate 2e-3 \
    --output_dir "$work/base-training"
  mv "$work"/base-training/epoch-3-step-* "$base"
fi

score() { # answers of an earlier run belong to another model
  python predict.py --mode glm3 --predict_path data/spo_1.json --max_length 384 --batch_size 50 --overwrite --model_path "$@"
}

echo "== 2/5 the base's answers to data/spo_1.json"
score "$base" --output_path "$work/base-predictions.jsonl"

echo "== 3/5 LoRA on data/spo_0.json"
rm -rf "$work/lora" "$work/merged"
"${launcher[@]}" train.py "${common[@]}" --train_type lora --model_name_or_path "$base" --train_path data/spo_0.json \
  --lora_dim 32 --lora_alpha 64 --lora_dropout 0 --lora_module_name query_key_value,dense,dense_h_to_4h,dense_4h_to_h \
  --per_device_train_batch_size 16 --num_train_epochs 4 --learning_rate 2e-3 --output_dir "$work/lora"

echo "== 4/5 merge"
adapter=$(echo "$work"/lora/epoch-4-step-*)
python merge_lora.py --mode glm3 --ori_model_dir "$base" --model_dir "$adapter" --output_dir "$work/merged"

echo "== 5/5 data/spo_1.json again"
score "$work/merged" --output_path "$work/lora-predictions.jsonl"

python -m tuning.evaluate.report --output_dir "$work/report" --mode glm3 --title "Quick start: a small ChatGLM3 before and after LoRA" \
  --run "base=$work/base-predictions.jsonl" --run "lora=$work/lora-predictions.jsonl,$work/lora"
