"""Diversity of free text: semantic entropy (Farquhar et al., Nature 2024) and SNNE (2025, arXiv:2506.00245)

For answers that can be verified the clusters are the canonical answers, and the discrete form is `answer_entropy`.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp, softmax

Entailment = Literal["entailment", "neutral", "contradiction"]


def means_the_same(forward: Entailment, backward: Entailment, *, is_strict: bool = True) -> bool:
    """Strict: each text entails the other. Else: neither contradicts the other, and not both are neutral."""
    both = (forward, backward)
    return both == ("entailment",) * 2 if is_strict else "contradiction" not in both and both != ("neutral",) * 2


def clusters(texts: Sequence[str], is_same: Callable[[str, str], bool]) -> list[int]:
    """The cluster of each text: the first one whose first member means the same, else a new one."""
    first: list[str] = []
    found = []
    for text in texts:
        known = next((i for i, member in enumerate(first) if is_same(member, text)), len(first))
        if known == len(first):
            first.append(text)
        found.append(known)
    return found


def semantic_entropy(logps: Float[np.ndarray, "N"], cluster: Sequence[int]) -> float:
    """-sum_c p_c log p_c, nats; p_c = share of the clusters in sum exp(s), s_i = `logps`: mean token log-prob.

    Refuses no response, and lists that differ in length.
    """
    if len(logps) != len(cluster) or not len(logps):
        raise ValueError(f"logps and cluster must be equally long and not empty, got {len(logps)} and {len(cluster)}")
    weights = softmax(np.asarray(logps, dtype=float))
    p = np.array([weights[np.asarray(cluster) == c].sum() for c in sorted(set(cluster))])
    return float(-(p * np.log(p)).sum())


def snne(
    similarity: Float[np.ndarray, "N N"], *, tau: float = 1.0, logps: Float[np.ndarray, "N"] | None = None
) -> float:
    """-1/n sum_i log sum_j exp(sim_ij / tau), j = i included; higher is more diverse.

    From -log n - 1/tau (all the same) to -log(e^(1/tau) + n - 1) (similarity 0 throughout), so compare at equal n.
    With `logps` (mean token log-probs) term i is weighted by exp(s_i) / mean exp(s): WSNNE. Refuses a tau that is not
    above 0.
    """
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    n = len(similarity)
    if similarity.shape != (n, n) or not n:
        raise ValueError(f"similarity must be a square matrix, got shape {similarity.shape}")
    terms = np.asarray(logsumexp(similarity / tau, axis=1))
    weights = np.ones(n) if logps is None else n * softmax(np.asarray(logps, dtype=float))
    return float(-(weights * terms).mean())
