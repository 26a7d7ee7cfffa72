# Sourced by quickstart.sh: triples from workshop notes.
work=${WORK:-output-quickstart}
base=$work/base
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

echo "== 2/5 the base's answers to data/spo_1.json"
score --model_path "$base" --predict_path data/spo_1.json --max_length 384 --output_path "$work/base-predictions.jsonl"

echo "== 3/5 LoRA on data/spo_0.json"
rm -rf "$work/lora" "$work/merged"
"${launcher[@]}" train.py "${common[@]}" "${lora[@]}" --model_name_or_path "$base" --train_path data/spo_0.json \
  --per_device_train_batch_size 16 --num_train_epochs 4 --learning_rate 2e-3 --output_dir "$work/lora"

echo "== 4/5 merge"
adapter=$(echo "$work"/lora/epoch-4-step-*)
python merge_lora.py --mode glm3 --ori_model_dir "$base" --model_dir "$adapter" --output_dir "$work/merged"

echo "== 5/5 data/spo_1.json again"
score --model_path "$work/merged" --predict_path data/spo_1.json --max_length 384 --output_path "$work/lora-predictions.jsonl"

python -m tuning.evaluate.report --output_dir "$work/report" --mode glm3 --title "Quick start: a small ChatGLM3 before and after LoRA" \
  --run "base=$work/base-predictions.jsonl" --run "lora=$work/lora-predictions.jsonl,$work/lora"
