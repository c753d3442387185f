"""Decay to the start, gated by the gradient's signal-to-noise ratio; derived here, for TRL's own trainers too"""

import math

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from ..equations.decay import pulled_back, signal


class DecayToStart(TrainerCallback):
    """After each optimiser step pulls weights back to where training began, but not where they are learning something.

        theta <- theta - lr rate (1 - SNR)(theta - theta_0)    SNR: `equations.decay.signal` of Adam's moments

    A direction in which gradients agree is free; the others, which drift on noise, decay. It needs no pass over the
    data: a copy of the trained weights (of a LoRA adapter alone, which then decays to the adapter that it began with),
    and one pass over them a step. `gate=False` is the control: SNR = 0, a decay of all alike.

    Give it to the trainer when you make it, so that it sees the start also when a run is resumed. It logs
    `decay_to_start/snr`, the mean over weights and steps, and `decay_to_start/distance`, |theta - theta_0|. For Adam
    and AdamW; not where the model is sharded (FSDP, ZeRO-3). In bf16 weights small pulls are lost in rounding. Refuses
    a run that goes on from a checkpoint where it came too late to see the start.

    Args:
        rate: strength of the pull beside the learning rate, above 0; ours, untried.
        gate: False: the decay without the gate.
    """

    adds_to_log = True  # it comes before what writes the log

    def __init__(self, rate: float = 1.0, gate: bool = True) -> None:
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"rate must be a positive number, got {rate}")
        self.rate, self.gate = rate, gate
        self.start: dict[nn.Parameter, Tensor] = {}
        self.seen: list[Tensor] = []  # mean SNR of each step since the last log

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        model = kwargs["model"]
        assert isinstance(model, nn.Module)
        self.start = {each: each.detach().clone() for each in model.parameters() if each.requires_grad}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.start:
            return
        if state.global_step:
            raise ValueError(
                "DecayToStart came after the trainer was made, and this run goes on from a checkpoint, so the start is "
                "not known: give it to the trainer as one of `callbacks`"
            )
        self.on_init_end(args, state, control, **kwargs)

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        optimizer, total, count = kwargs["optimizer"], torch.zeros(()), 0
        assert hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")
        for group in optimizer.param_groups:  # pyright: ignore[reportAttributeAccessIssue]
            for weights in group["params"]:
                kept = optimizer.state.get(weights, {})  # pyright: ignore[reportAttributeAccessIssue]
                if weights.grad is None and not kept:
                    continue
                start = self._start_of(weights)
                snr = (
                    self._signal(kept, group, OptimizerNames(args.optim).value)
                    if self.gate
                    else torch.zeros_like(start)
                )
                wide = pulled_back(weights.float(), start.float(), group["lr"] * self.rate, snr.float())
                weights.copy_(wide)
                total, count = total.to(snr.device) + snr.float().sum(), count + snr.numel()
        self.seen.append(total / max(count, 1))

    def _start_of(self, weights: nn.Parameter) -> Tensor:
        start = self.start.get(weights)
        if start is None or start.shape != weights.shape:
            raise ValueError(
                "DecayToStart has no start of some of the weights that the optimiser moves: a model that is sharded "
                "(FSDP, ZeRO-3) or that another optimiser wraps is not supported"
            )
        if start.device != weights.device:
            start = self.start[weights] = start.to(weights.device)
        return start

    def _signal(self, kept: dict, group: dict, optimizer: str) -> Tensor:
        if not {"exp_avg", "exp_avg_sq", "step"} <= kept.keys() or "betas" not in group:
            raise ValueError(
                f"DecayToStart with its gate reads Adam's two moments, which optim {optimizer} does not keep: set optim"
                " to adamw_torch, or gate to false"
            )
        (beta1, beta2), step = group["betas"], float(kept["step"])
        first, second = kept["exp_avg"] / (1 - beta1**step), kept["exp_avg_sq"] / (1 - beta2**step)
        return signal(first, second, beta1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if logs is None or not self.seen:
            return
        squares = [(now.detach() - self._start_of(now)).float().square().sum() for now in self.start]
        found = {
            "decay_to_start/snr": torch.stack(self.seen).mean().item(),
            "decay_to_start/distance": torch.stack(squares).sum().sqrt().item(),
        }
        self.seen = []
        for entry in (logs, *state.log_history[-1:]):  # the Trainer keeps a copy of its own
            entry.update(found)
