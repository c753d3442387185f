"""Ranks and spectral decay of the hidden states: Li et al., 2025, arXiv:2509.23024"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..equations.functional import exactly, quantile
from ..equations.geometry import Moments, eigenvalues, moments_everywhere
from ..equations.rows import mean_of_responses
from ..equations.spectra import (
    alpha_req,
    diffusion_spectral_entropy,
    diffusion_spectral_information,
    effective_rank,
    participation_ratio,
    rank_me,
    spectrum,
)
from ..equations.surrogates import second_moment, unit_rows
from ..types import Metric, Rollout, RolloutEffect, Term


@dataclass(frozen=True, kw_only=True)
class Spectrum(Term):
    """Changes nothing; says every `spectrum_every` steps how many directions the hidden states use.

    Of the last states (after the final norm, those that predicted the response tokens) over the whole generation batch
    and all processes: `effective_rank` exp(-sum p log p), p the normalised eigenvalues of the centred covariance (what
    the paper's code calls RankMe); `rank_me`, the same of the singular values of the uncentred states (RankMe, Garrido
    et al., 2023, arXiv:2210.02885); `participation_ratio` (sum lam)^2 / sum lam^2; `alpha` and `alpha_r2` of
    lam_j ~ j^-alpha (alpha-ReQ, Agrawal et al., 2022), left out unless more rows than `last_rank` span as many
    directions. Rank falling while alpha rises: the states compress. Never compare one rank with another's threshold,
    nor runs with other numbers of tokens.
    Of the mean states of the responses, at unit length: `diffusion_entropy` (DSE, Liao et al., 2023, arXiv:2312.04823,
    here in nats), up to the log of their number; `diffusion_entropy_within`, its mean over prompts: towards 0, the
    responses to a prompt have become one; `diffusion_information` (their DSMI), how much the prompt says of a
    response's state: 0 where all prompts are answered alike. The bandwidth is the median distance at the first step,
    frozen, since one that followed would hide a contraction.

    Args:
        rows: "last": one row a response, as the paper (25,000 of them), whose state is one position later: at the last
            token
        spectrum_every: optimiser steps between two eigenvalue decompositions, >= 1; ours
        first_rank: window of alpha, counted from 1; the paper's 12..100, alpha-ReQ's own is 4..100
        last_rank: last of that window, above `first_rank`; the paper's
        diffusion_time: power of the diffusion operator, > 0; the authors' value
        most_responses: for `diffusion_entropy`, cubic in them: the first ones, >= 2; the authors' value

    Metrics:
        effective_rank (directions): exp of the entropy of the centred covariance's normalised eigenvalues. Healthy:
            does not fall for long while `alpha` rises. Else: the states compress; do not compare runs with other
            numbers of tokens
        rank_me (directions): the same of the singular values of the uncentred states
        participation_ratio (directions): (sum lam)^2 / sum lam^2
        alpha (exponent): of lam_j ~ j^-alpha, where more rows than `last_rank` span as many directions
        alpha_r2 (share): of the variance that this line explains. Healthy: near 1. Else: `alpha` means little
        diffusion_entropy (nats): of the responses' mean states, up to the log of their number
        diffusion_entropy_within (nats): its mean over prompts. Healthy: above 0. Else: towards 0 the responses to a
            prompt have become one
        diffusion_information (nats): how much the prompt says of a response's state. Healthy: above 0. Else: at 0 all
            prompts are answered alike
    """

    needs_scores: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = True
    is_diagnostic: ClassVar[bool] = True

    rows: Literal["tokens", "last"] = "tokens"
    spectrum_every: int = 50
    first_rank: int = 12
    last_rank: int = 100
    diffusion_time: float = 1.0
    most_responses: int = 10_000

    def __post_init__(self) -> None:
        if self.spectrum_every < 1:
            raise ValueError(f"spectrum_every must be at least 1, got {self.spectrum_every}")
        if not 1 <= self.first_rank < self.last_rank:
            raise ValueError(f"ranks must be 1 <= first_rank < last_rank, got {self.first_rank} and {self.last_rank}")
        if not self.diffusion_time > 0:
            raise ValueError(f"diffusion_time must be positive, got {self.diffusion_time}")
        if self.most_responses < 2:
            raise ValueError(f"most_responses must be at least 2, got {self.most_responses}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        # one that is further off was planned by a run with another step, or by another spectrum_every
        if rollout.step < memory.get("next_spectrum", 0) <= rollout.step + self.spectrum_every:
            return RolloutEffect()
        memory["next_spectrum"] = rollout.step + self.spectrum_every
        states = rollout.states()
        if self.rows == "last":
            states = states[(rollout.mask.flip(1).cumsum(dim=1).flip(1) == 1)[rollout.mask]]
        m = moments_everywhere(states, rollout.total)
        metrics = self._ranks(m) if m.count >= 2 else {}
        return RolloutEffect(metrics=metrics | self._diffusion(rollout, memory))

    def _ranks(self, m: Moments) -> dict[str, Metric]:
        # N rows span N directions, N - 1 once centred: what float32 leaves in the others would count by its root
        count = int(m.count)
        centred = spectrum(m)[-(count - 1) :]
        uncentred = eigenvalues(second_moment(m))[-count:]
        metrics: dict[str, Metric] = {
            "effective_rank": effective_rank(centred),
            "rank_me": rank_me(uncentred),
            "participation_ratio": participation_ratio(centred),
        }
        law = alpha_req(centred, self.first_rank, self.last_rank)
        if math.isfinite(law.alpha) and math.isfinite(law.r2):
            metrics |= {"alpha": centred.new_tensor(law.alpha), "alpha_r2": centred.new_tensor(law.r2)}
        return metrics

    def _diffusion(self, rollout: Rollout, memory: dict) -> dict[str, Metric]:
        has_tokens = rollout.everywhere(rollout.mask.any(dim=1))
        u = rollout.everywhere(unit_rows(mean_of_responses(rollout.states(), rollout.mask)))[has_tokens]
        group = rollout.everywhere(rollout.group)[has_tokens]
        first = u[: self.most_responses]
        if "bandwidth" not in memory and len(first) >= 2:
            median = float(quantile(torch.pdist(exactly(first)), 0.5))
            if median > 10 * torch.finfo(torch.float32).eps:  # of unit rows that differ by more than rounding
                memory["bandwidth"] = median
        if "bandwidth" not in memory or len(first) < 2:
            return {}
        bandwidth, time = memory["bandwidth"], self.diffusion_time
        metrics: dict[str, Metric] = {"diffusion_entropy": diffusion_spectral_entropy(first, bandwidth, time)}
        prompts = [u[group == prompt] for prompt in group.unique()]
        within = [diffusion_spectral_entropy(rows, bandwidth, time) for rows in prompts if len(rows) >= 2]
        if within:
            metrics["diffusion_entropy_within"] = torch.stack(within).mean()
            metrics["diffusion_information"] = diffusion_spectral_information(
                first, group[: len(first)], bandwidth, rollout.generator, time
            )
        return metrics
