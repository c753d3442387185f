"""Pull back only where the gradient is noise: Adam's moments say which directions are being learnt; derived here"""

import torch
from jaxtyping import Float
from torch import Tensor


def signal(
    first: Float[Tensor, "*S"], second: Float[Tensor, "*S"], beta1: float, floor: float = 1e-38
) -> Float[Tensor, "*S"]:
    """SNR = clip((m^2 / v - kappa) / (1 - kappa), 0, 1), kappa = (1 - beta1) / (1 + beta1), of bias-corrected moments.

    kappa is what m^2 / v tends to where gradients are independent and of mean 0: then SNR is 0. Where they are all
    alike m^2 = v and SNR is 1. Where no gradient ever came, v = 0, it is 0.
    """
    kappa = (1 - beta1) / (1 + beta1)
    return ((first.square() / second.clamp(min=floor) - kappa) / (1 - kappa)).clamp(0, 1)


def pulled_back(
    theta: Float[Tensor, "*S"], start: Float[Tensor, "*S"], rate: float, snr: Float[Tensor, "*S"] | float
) -> Float[Tensor, "*S"]:
    """theta - rate (1 - SNR)(theta - start); rate: the learning rate times the strength."""
    return theta - rate * (1 - torch.as_tensor(snr).to(theta)) * (theta - start)
