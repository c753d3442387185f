#!/usr/bin/env bash
# GSM8K with a model of 1.5B parameters under SkyRL 0.3.0 on four GPUs, with Clip-Cov.
#
#   bash examples/skyrl/gsm8k_1.5b.sh
#
# Data: SkyRL's own examples/train/gsm8k/gsm8k_dataset.py writes both files. Without terms: leave out the first two.
#
# NOT RUN BY US: no memory, time or result is known. That SkyRL reads these settings, and that our adapter takes them, is
# tested on a CPU (tests/integrations/test_skyrl.py). Sources:
#   [SkyRL]  this model on GSM8K: NovaSky-AI/SkyRL, examples/train/gsm8k/run_gsm8k.sh
#   [paper]  Clip-Cov, Cui et al., arXiv:2505.22617
# Left at SkyRL's defaults: loss_reduction token_mean, which is TRL's dapo; advantages over the group's deviation.
settings=(
  # the two keys that switch the terms on
  trainer.override_entrypoint=hclm_rl.integrations.skyrl
  hclm_rl.recipe=examples/skyrl/terms.yaml
  trainer.algorithm.advantage_estimator=grpo # [SkyRL]; divides by the deviation, as the bounds of clip_cov assume
  trainer.algorithm.policy_loss_type=regular # PPO's clip; SkyRL's own clip_cov beside ours would be two hands on one wheel
  trainer.algorithm.eps_clip_low=1.0         # [paper]: Clip-Cov is run with epsilon 1 in both directions
  trainer.algorithm.eps_clip_high=1.0        # [paper]
  trainer.algorithm.use_kl_loss=false        # [paper] has none; [SkyRL] has one
  data.train_data="['$HOME/data/gsm8k/train.parquet']"    # [SkyRL]
  data.val_data="['$HOME/data/gsm8k/validation.parquet']" # [SkyRL]
  environment.env_class=gsm8k                             # [SkyRL]: the reward
  trainer.policy.model.path=Qwen/Qwen2.5-1.5B-Instruct    # [SkyRL]
  trainer.policy.optimizer_config.lr=1.0e-6               # [SkyRL]
  trainer.epochs=20                                       # [SkyRL]
  trainer.train_batch_size=1024                           # prompts, [SkyRL]
  trainer.policy_mini_batch_size=256                      # prompts, [SkyRL]: so 4 updates from a rollout
  trainer.micro_forward_batch_size_per_gpu=64             # responses, [SkyRL]
  trainer.micro_train_batch_size_per_gpu=64               # responses, [SkyRL]
  trainer.max_prompt_length=512                           # tokens, [SkyRL]
  generator.sampling_params.max_generate_length=1024      # tokens, [SkyRL]
  generator.n_samples_per_prompt=5                        # [SkyRL]
  trainer.placement.colocate_all=true                     # [SkyRL]
  trainer.placement.policy_num_gpus_per_node=4            # [SkyRL]
  trainer.placement.ref_num_gpus_per_node=4               # [SkyRL]
  generator.inference_engine.num_engines=2                # [SkyRL]: 2 engines of 2 GPUs
  generator.inference_engine.tensor_parallel_size=2       # [SkyRL]
  generator.inference_engine.gpu_memory_utilization=0.8   # [SkyRL]
  trainer.ckpt_interval=10                                # [SkyRL]; what terms remember is in a checkpoint
  trainer.ckpt_path="$HOME/ckpts/gsm8k_1.5b_clip_cov"     # a folder of its own
)
python -m skyrl.train.entrypoints.main_base "${settings[@]}" "$@"
