#!/usr/bin/env bash
# Compare freeze, P-Tuning (with and without projection), LoRA and all parameters: train, evaluate, report.
#
#   MODEL   folder of the base model, with MODE its family (glm, glm2, glm3). Without MODEL, a small base of each family
#           in MODE (default "glm glm2 glm3") is made first, see scripts/small_base.sh, and the comparison runs on those
#   DATA    rows to train on               (default data/spo_0.json; small bases take the first ROWS of it, default 700)
#   TEST    rows to score                  (default data/spo_1.json)
#   METHODS some of freeze ptuning ptuning-plain lora all   (default all five)
#   SEEDS   one training for each          (default "1 2 3")
#   OUTPUT  folder of runs and report      (default output-compare)
#   SWEEP   True: first try three learning rates per method
#
# Uses the python of the active environment. Flags are passed to python -m tuning.evaluate.compare, such as --jobs 2 or
# --num_gpus 4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/small_base.sh
output=${OUTPUT:-output-compare} data=${DATA:-data/spo_0.json} test=${TEST:-data/spo_1.json}
models=() flags=()
if [ -n "${MODEL:-}" ]; then
  models=("${MODE:?MODE must name the family of MODEL: glm, glm2 or glm3}=$MODEL")
else
  mkdir -p "$output/bases"
  for mode in ${MODE:-glm glm2 glm3}; do
    make_small_base "$mode" "$output/bases/$mode"
    models+=("$mode=$output/bases/$mode")
  done
  # forgetting is measured on unseen notes in the form that the small base learned: it cannot answer general prompts
  rows_of_small_base data/spo_1.json "$output/suite.json" "notes in the base's form"
  head -n "${ROWS:-700}" "$data" >"$output/rows.json"
  data=$output/rows.json
  flags=(--suite "$output/suite.json")
fi
[ -z "${METHODS:-}" ] || flags+=(--methods $METHODS)
[ -z "${SEEDS:-}" ] || flags+=(--seeds $SEEDS)
python -m tuning.evaluate.compare --model "${models[@]}" --train_path "$data" --test_path "$test" --output_dir "$output" \
  --sweep "${SWEEP:-False}" "${flags[@]}" "$@"
