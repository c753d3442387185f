"""pass@k of the held-out prompts while a model is trained: what `eval_pass_at_k` adds to TRL's evaluation."""

import numpy as np
from jaxtyping import Float

from hclm_rl.responses.outcomes import pass_at_k

from .compare import budgets
from .statistics import interval


def pass_metrics(rewards: Float[np.ndarray, "P G"], threshold: float, prefix: str) -> dict[str, float]:
    """`<prefix>_pass@k` for k = 1, 2, 4, ..., G and its 95 % interval over the prompts, `.../lower` and `.../upper`.

    A response is right where its reward is at least `threshold`. Prompts with a response that has no reward (NaN) are
    left out; one prompt alone has no interval.

    Metrics:
        eval_pass@<k> (share): of the held-out prompts that one of k responses solves, with `eval_pass_at_k`. Healthy:
            at the largest k not more than 0.05 below its first value. Else: what the model could solve is being lost:
            hold it, as with right_anchor or a KL (docs/choose.md)
        eval_pass@<k>/lower (share): lower end of its 95 % interval over the prompts
        eval_pass@<k>/upper (share): upper end of it
    """
    rewards = rewards[~np.isnan(rewards).any(axis=1)]
    problems, n = rewards.shape
    if not problems:
        return {}
    right = (rewards >= threshold).sum(axis=1)
    curve = np.array([[pass_at_k(n, int(c), k) for c in right] for k in budgets(n)])
    lower, upper = interval(curve)
    found = {}
    for k, mean, low, high in zip(budgets(n), curve.mean(axis=1), lower, upper, strict=True):
        found[f"{prefix}_pass@{k}"] = float(mean)
        if problems > 1:
            found |= {f"{prefix}_pass@{k}/lower": float(low), f"{prefix}_pass@{k}/upper": float(high)}
    return found
