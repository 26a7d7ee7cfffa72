#!/usr/bin/env bash
# A whole run on this machine, on a CPU if there is no GPU: makes an environment and a small ChatGLM3, tunes it by LoRA with
# DeepSpeed, merges, answers rows that are not in the training data, and writes a report with curves and with answers beside
# references.
#
#   bash scripts/quickstart.sh        finds faults in workshop notes; the small base knows such notes a little
#   bash scripts/quickstart.sh chat   calls tools and answers from what they return; the small base can read and copy
#
#   VENV   folder of the virtual environment, made if missing (default .venv)
#   PYTHON the Python that makes it      (default python3; 3.11 or newer)
#   PORT   of the launcher               (default 29521)
#   WORK   folder for models and results (default output-quickstart, or output-quickstart-chat); a small base in it is reused
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "$*" in
  "") page=notes ;;
  chat) page=chat ;;
  *) # without this, a typing error would start minutes of work
    sed -n '2,/^set/s/^# \{0,1\}//p' scripts/quickstart.sh
    case $1 in -h | --help) exit 0 ;; esac
    echo "error: quickstart.sh takes chat or nothing, and the variables above" >&2
    exit 2
    ;;
esac
source scripts/environment.sh
make_environment requirements.txt

launcher=(deepspeed --log_level warning --num_gpus 1 --master_port "${PORT:-29521}")
# LoRA on all linear layers: the small base has so few that rank 32 is not much
lora=(--train_type lora --lora_dim 32 --lora_alpha 64 --lora_dropout 0
  --lora_module_name "query_key_value,dense,dense_h_to_4h,dense_4h_to_h")

score() { # answers of an earlier run belong to another model
  python predict.py --mode glm3 --batch_size 50 --overwrite "$@"
}

source "scripts/quickstart_$page.sh"
