"""What TRL 1.16 and transformers log of a run.

Metrics:
    loss (-): of the step, as its loss type averages it. It says little of learning: advantages sum to about 0
    grad_norm (-): norm of the gradient before it is clipped. Healthy: finite. Else: what is not finite stops the run
        with the term's name; where it grows, lower the learning rate
    learning_rate (-): of this step
    epoch (epochs): passes over the prompts so far
    num_tokens (tokens): read and written so far, over all processes
    step_time (seconds): of a step, generation included
    reward (reward): mean of the weighted sum of the reward functions. Healthy: rises. Else: flat from the start: the
        prompts are too hard or too easy, see `frac_reward_zero_std`; falling: lower the learning rate
    reward_std (reward): its deviation over all responses of the batch. Healthy: above 0. Else: there is nothing to
        learn from: other prompts, or a graded reward
    frac_reward_zero_std (share): of the responses whose group has equal rewards, from which nothing is learnt.
        Healthy: below 1. Else: near 1 prompts are too easy or too hard for the policy: choose others, or more
        num_generations
    rewards/<name>/mean (reward): mean of one reward function
    rewards/<name>/std (reward): its deviation
    entropy (nats): mean over the response tokens of the next-token distribution's entropy, at the sampling temperature.
        Healthy: above half of its start, below twice of it. Else: see docs/troubleshooting.md; `hclm-rl watch` says
        what it does
    entropy_coef (coefficient): of TRL's own entropy bonus, where it is on
    kl (nats): mean over tokens of the KL to the reference model, estimated; with `beta` above 0. Healthy: below the
        entropy. Else: the policy has left its start: raise `beta`, or lower the learning rate
    clip_ratio/low_mean (share): of the tokens that the lower clip drops, 0 where each rollout is used for one update
    clip_ratio/low_min (share): the least of that over the processes
    clip_ratio/high_mean (share): of the tokens that the upper clip drops
    clip_ratio/high_max (share): the greatest of that over the processes
    clip_ratio/region_mean (share): of the tokens that either clip drops. Healthy: below 0.3. Else: fewer updates per
        rollout, or a smaller learning rate
    cispo_clip_ratio (share): of the tokens whose weight is at its bound, with loss type cispo
    vespo/phi_seq_mean (weight): mean weight of a response, with loss type vespo
    policy_loss (-): the loss without the KL or the balance of experts
    aux_loss (-): of a mixture of experts, which balances them
    completions/mean_length (tokens): of the responses. Healthy: changes slowly. Else: read some responses
        (`log_completions: true`): a reward may pay for length
    completions/min_length (tokens): of the shortest response
    completions/max_length (tokens): of the longest response
    completions/clipped_ratio (share): of the responses that max_completion_length cut off. Healthy: below 0.5. Else:
        raise max_completion_length, or ask for shorter answers: what is cut off has no answer
    completions/mean_terminated_length (tokens): of the responses that ended by themselves
    completions/min_terminated_length (tokens): of the shortest of them
    completions/max_terminated_length (tokens): of the longest of them
    sampling/sampling_logp_difference/mean (nats): between the log-probs of the inference engine and the trainer's, a
        token; with vLLM. Healthy: near 0. Else: the engine has other weights or another precision than the trainer
    sampling/sampling_logp_difference/max (nats): the greatest of that
    sampling/importance_sampling_ratio/min (ratio): of the trainer's probabilities to the engine's, the least
    sampling/importance_sampling_ratio/mean (ratio): its mean. Healthy: near 1. Else: as above
    sampling/importance_sampling_ratio/max (ratio): the greatest
    tools/call_frequency (calls a response): mean number of tool calls
    tools/failure_frequency (share): of the tool calls that failed. Healthy: falls. Else: look at the calls and at what
        the tool answers
    total_flos (operations): floating-point operations of the run, as transformers estimates them; at the end
    train_loss (-): mean loss of the run, at the end
    train_runtime (seconds): of the run, at the end
    train_samples_per_second (responses a second): of the run, at the end
    train_steps_per_second (steps a second): of the run, at the end
    runtime (seconds): of an evaluation, as `eval_runtime`
    samples_per_second (responses a second): of an evaluation
    steps_per_second (steps a second): of an evaluation
"""
