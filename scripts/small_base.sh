# Read by quickstart.sh and compare_methods.sh: makes a small base model of a family, for machines that cannot hold a
# real one. Random weights of 4 layers x 192, then all parameters trained on two tasks: workshop notes (3,000 rows that
# data/make_data.py makes, none of them in data/spo_1.json) and data/d2q_0.json. So it knows both a little, and tuning
# on one shows what is gained there and lost in the other. Minutes on 2 CPU cores.
#
#   BASE_ROWS, BASE_EPOCHS   how much it learns (default 3000 notes, 2 passes)
#   PORT                     of the launcher (default 29521)
make_small_base() { # mode, folder; nothing to do if the folder is there
  local mode=$1 base=$2 work=$2-making epochs=${BASE_EPOCHS:-2}
  [ ! -d "$base" ] || return 0
  rm -rf "$work"
  mkdir -p "$work"
  python data/make_data.py --more "${BASE_ROWS:-3000}" "$work/notes.json"
  python -m glm_models.tiny --mode "$mode" --output "$work/random" --layers 4 --hidden_size 192 --heads 6 \
    --vocab_size 2000 --text "$work/notes.json" data/spo_0.json data/d2q_0.json
  cat "$work/notes.json" data/d2q_0.json >"$work/base-data.json"
  deepspeed --log_level warning --num_gpus 1 --master_port "${PORT:-29521}" train.py --mode "$mode" --train_type all \
    --model_name_or_path "$work/random" --train_path "$work/base-data.json" --max_len 384 --max_src_len 256 \
    --per_device_train_batch_size 16 --num_train_epochs "$epochs" --learning_rate 2e-3 --weight_decay 0.01 \
    --show_loss_step 50 --output_dir "$work/training"
  mv "$work/training/epoch-$epochs"-step-* "$base"
  rm -rf "$work"
}
