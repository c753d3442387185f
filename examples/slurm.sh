#!/bin/bash
# Several nodes of eight GPUs under SLURM: all but the last train with FSDP2, the last samples with vLLM.
#
#   sbatch examples/slurm.sh examples/gsm8k_7b.yaml Qwen/Qwen2.5-7B-Instruct          # a recipe, and its model
#   sbatch --nodes=5 examples/slurm.sh RECIPE MODEL --output_dir runs/on_five         # what follows goes to hclm-rl
#
# NOT RUN BY US ON A CLUSTER: the tests run it with stand-ins for srun, scontrol and curl, and read both commands that it
# starts. hclm_rl, its extra `vllm`, the recipe, data and model must be in the same place on all nodes (a shared folder).
#
#SBATCH --job-name=hclm_rl
#SBATCH --nodes=3              # two that train and one that samples; at least 2
#SBATCH --ntasks-per-node=1    # one launcher a node: accelerate starts a process for each of its GPUs
#SBATCH --gpus-per-node=8      # change GPUS below with it
#SBATCH --cpus-per-task=64     # of a launcher: eight processes and their data loaders
#SBATCH --exclusive            # nobody else on the nodes
#SBATCH --time=24:00:00        # a run that is cut off goes on with --resume_from_checkpoint true (docs/howto/resume.md)
#SBATCH --output=%x-%j.out     # the trainer's output; vLLM's is in vllm-<job>.out

set -euo pipefail              # end at the first command that fails, and at a name that is not set

GPUS=8                         # of a node
PORT=8000                      # vLLM's, on the last node
RECIPE=$1                      # as in `hclm-rl grpo --config RECIPE`
MODEL=$2                       # vLLM loads it by name; the recipe's model_name_or_path must be the same
shift 2                        # what is left goes to hclm-rl as it stands

mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # the names of the nodes of this job, one a line
TRAINERS=$((${#NODES[@]} - 1))                                      # all but the last
FIRST=${NODES[0]}                                                   # where the trainers' processes meet
SAMPLER=${NODES[-1]}                                                # vLLM's node
TRAIN_ON=$(IFS=, && echo "${NODES[*]:0:TRAINERS}")                  # as srun reads a list: a,b

# The server: the model split over all GPUs of its node, with what TRL needs to send it new weights.
srun --nodes=1 --ntasks=1 --nodelist="$SAMPLER" --output="vllm-${SLURM_JOB_ID}.out" \
  trl vllm-serve --model "$MODEL" --tensor_parallel_size "$GPUS" --host 0.0.0.0 --port "$PORT" &
SERVER=$!
trap 'kill "$SERVER" 2>/dev/null || true' EXIT # it goes when the training ends, also where that failed

# Wait until it answers, which takes minutes for a large model; give up where it has ended.
until curl --silent --fail --output /dev/null "http://$SAMPLER:$PORT/health"; do
  kill -0 "$SERVER" 2>/dev/null || { echo "vLLM ended: see vllm-${SLURM_JOB_ID}.out" >&2; exit 1; }
  sleep 5
done

# One launcher a training node. SLURM_PROCID is its number among them, known only there, hence the inner shell.
#   --num_processes  of all nodes together; --num_machines, --machine_rank, --main_process_ip, --main_process_port: how
#                    they find each other (the port of the configuration, 0, would be another on each node)
#   vllm_mode        server, at the address above, in place of what the recipe says
srun --nodes="$TRAINERS" --ntasks="$TRAINERS" --nodelist="$TRAIN_ON" bash -c '
  accelerate launch --config_file recipes/accelerate/fsdp2.yaml \
    --num_machines "$1" --num_processes "$2" --machine_rank "$SLURM_PROCID" \
    --main_process_ip "$3" --main_process_port 29500 \
    --module hclm_rl grpo --config "$4" \
    --use_vllm true --vllm_mode server --vllm_server_base_url "$5" "${@:6}"
' launch "$TRAINERS" "$((TRAINERS * GPUS))" "$FIRST" "$RECIPE" "http://$SAMPLER:$PORT" "$@"
