# Sourced by quickstart.sh: conversations with tools. The base is so small that it must learn to copy first: words to repeat
# and questions whose answers name tool and parameters in words. One row in three of these calls as in data/tools_0.json.
work=${WORK:-output-quickstart-chat}
base=$work/base
common=(--mode glm3 --max_len 512 --max_src_len 400 --packing --per_device_train_batch_size 3 --weight_decay 0.01
  --show_loss_step 50)

if [ ! -d "$base" ]; then
  echo "== 1/5 a small base: random weights, then trained to repeat and to read questions (no call of data/tools_1.json)"
  rm -rf "$work/random" "$work/base-training"
  mkdir -p "$work"
  python data/make_tools.py --repeat 6000 "$work/repeats.json"
  python data/make_tools.py --base 3000 "$work/questions.json"
  cat "$work/repeats.json" "$work/questions.json" >"$work/base.json"
  python data/make_tools.py --text "$work/tokenizer.txt"
  python -m glm_models.tiny --mode glm3 --output "$work/random" --layers 2 --hidden_size 128 --heads 2 --vocab_size 600 \
    --text "$work/tokenizer.txt"
  "${launcher[@]}" train.py "${common[@]}" --train_type all --model_name_or_path "$work/random" \
    --train_path "$work/base.json" --num_train_epochs 4 --learning_rate 2e-3 --warmup_ratio 0.03 \
    --output_dir "$work/base-training"
  mv "$work"/base-training/epoch-4-step-* "$base"
fi

answer() { # name, model: new calls, and answers from what the tools returned
  score --model_path "$2" --max_length 512 --predict_path data/tools_1.json --output_path "$work/$1-calls.jsonl"
  score --model_path "$2" --max_length 512 --predict_path data/tools_2.json --output_path "$work/$1-answers.jsonl"
}

echo "== 2/5 the base's answers to data/tools_1.json (calls) and data/tools_2.json (answers from what a tool returned)"
answer base "$base"

echo "== 3/5 LoRA on data/tools_0.json"
rm -rf "$work/lora" "$work/merged"
"${launcher[@]}" train.py "${common[@]}" "${lora[@]}" --model_name_or_path "$base" --train_path data/tools_0.json \
  --num_train_epochs 3 --learning_rate 2e-3 --output_dir "$work/lora"

echo "== 4/5 merge"
adapter=$(echo "$work"/lora/epoch-3-step-*)
python merge_lora.py --mode glm3 --ori_model_dir "$base" --model_dir "$adapter" --output_dir "$work/merged"

echo "== 5/5 data/tools_1.json and data/tools_2.json again"
answer lora "$work/merged"

python -m tuning.evaluate.report --output_dir "$work/report" --mode glm3 --title "Quick start: a small ChatGLM3 learns to call tools" \
  --run "base=$work/base-calls.jsonl" --run "lora=$work/lora-calls.jsonl,$work/lora"
