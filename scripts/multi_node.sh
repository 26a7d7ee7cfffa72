#!/usr/bin/env bash
# A training on several machines. Change the three blocks below to yours, then take one of the three ways:
#
#   bash scripts/multi_node.sh deepspeed        on the first machine; the others are reached by ssh (needs pdsh)
#   bash scripts/multi_node.sh torchrun 0       on the first machine, and on the others with 1, 2, ... in place of 0
#   sbatch scripts/multi_node.sh                under Slurm; the lines with #SBATCH are for it
#
# Every machine needs the same code, libraries, base model and data, on a shared disk or as copies under the same paths.
# See docs/scaling.md, "Several nodes".

#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --distribution=block
#SBATCH --signal=USR1@300
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"

# 1. The machines, the first one first, and the GPUs of each.
read -ra NODES <<<"${NODES:-node-1 node-2}"
GPUS=${GPUS:-8}
PORT=${PORT:-29520}

# 2. The network interface between them, if it is not the one by which they reach the first machine:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# 3. The training. Its folder for results may be on a shared disk or not.
TRAIN=(train.py --mode glm3 --train_type lora --model_name_or_path "${MODEL:-ChatGLM3-6B}"
  --train_path "${DATA:-data/spo_0.json}" --output_dir "${OUTPUT:-./output-glm3-lora}"
  --num_train_epochs 2 --max_len 1560 --max_src_len 1024 --per_device_train_batch_size 1
  --gradient_accumulation_steps 1 --learning_rate 1e-4 --lora_dim 16 --lora_module_name query_key_value
  --ds_file ds_zero2_no_offload.json --gradient_checkpointing
  --save_state_steps 200 --resume_from_checkpoint auto)

if [ -n "${SLURM_JOB_ID:-}" ]; then # sbatch: Slurm starts every process
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
  export MASTER_ADDR MASTER_PORT=$PORT
  trap '' USR1 # Slurm's signal is for train.py, which saves a state
  exec srun --kill-on-bad-exit=1 python "${TRAIN[@]}"
fi

case ${1:-} in
  deepspeed)
    hostfile=$(mktemp)
    printf "%s slots=$GPUS\n" "${NODES[@]}" >"$hostfile"
    # the launcher hands on only variables that begin with NCCL, PYTHON, MLFLOW, MV2 or UCX; the others stand here
    [ -z "${GLOO_SOCKET_IFNAME:-}" ] || [ -e .deepspeed_env ] || echo "GLOO_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME" >.deepspeed_env
    exec deepspeed --hostfile "$hostfile" --master_port "$PORT" "${TRAIN[@]}"
    ;;
  torchrun)
    exec torchrun --nnodes "${#NODES[@]}" --nproc_per_node "$GPUS" --node_rank "${2:?number of this machine}" \
      --master_addr "${NODES[0]}" --master_port "$PORT" "${TRAIN[@]}"
    ;;
  *)
    sed -n '2,9p' "$0"
    exit 2
    ;;
esac
