# Sourced by scripts/<mode>/<train_type>.sh: one launch, with the settings that all of them share.
#
#   MODEL     folder of the base model          (default: the official name in the project folder)
#   DATA      instruction file                  (default: data/spo_0.json)
#   OUTPUT    folder for results                (default: ./output-<mode>-<train_type>)
#   GPUS      which GPUs, as 0 or 0,1,2,3       (default: all)
#   NUM_GPUS  number of processes instead, for a machine without a GPU
#   PORT      of the launcher                   (default: 29520)
#
# Flags after the script's name are passed to train.py and override the settings here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch() { # mode, train_type, default model, flags of the method ..., flags of the caller
  local mode=$1 train_type=$2 model=$3
  shift 3
  [[ " $* " == *" --max_steps"* ]] || set -- --num_train_epochs 2 "$@"
  local launcher=(deepspeed --log_level warning --master_port "${PORT:-29520}")
  [ -z "${GPUS:-}" ] || export CUDA_VISIBLE_DEVICES=$GPUS
  trap '' USR1 # Slurm's signal is for train.py, which saves a state; it would kill the launcher
  [ -z "${NUM_GPUS:-}" ] || launcher+=(--num_gpus "$NUM_GPUS")
  exec "${launcher[@]}" train.py \
    --mode "$mode" \
    --train_type "$train_type" \
    --model_name_or_path "${MODEL:-$model}" \
    --train_path "${DATA:-data/spo_0.json}" \
    --output_dir "${OUTPUT:-./output-$mode-$train_type}" \
    --max_len 1560 \
    --max_src_len 1024 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 4 \
    --learning_rate 1e-4 \
    --weight_decay 0.1 \
    --warmup_ratio 0.1 \
    --seed 1234 \
    --ds_file ds_zero2_no_offload.json \
    --gradient_checkpointing \
    --show_loss_step 10 \
    "$@"
}
