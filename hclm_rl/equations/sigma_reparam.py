"""sigmaReparam: Zhai et al., 2023, arXiv:2303.06296, for a model that is trained on, and the bound behind it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .geometry import at_least_float32
from .triangles import full_precision

__all__ = ["SigmaReparam", "attention_entropy_bound", "sigma_reparam"]


class SigmaReparam(nn.Module):
    """W_hat = gamma W / sigma(W), sigma the largest singular value, gamma one learnable number.

    sigma = v^T W u by one step of power iteration at each training forward: v = W u / |W u|, u = W^T v / |W^T v|,
    both without gradient; sigma is differentiated through W. Passes without gradient and the second forward of
    gradient checkpointing keep u and v. At first u and v are the exact ones and gamma = sigma(W): the layer starts
    unchanged.
    """

    def __init__(self, weight: Float[Tensor, "O I"]) -> None:
        super().__init__()
        # float32 whatever the weights: in half precision sigma would jump by a per cent from step to step
        left, values, right = torch.linalg.svd(at_least_float32(weight.detach()), full_matrices=False)
        self.gamma = nn.Parameter(values[0])
        self.u: Tensor
        self.v: Tensor
        self.register_buffer("u", right[0])
        self.register_buffer("v", left[:, 0])

    def forward(self, weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        # inside a backward pass, which has a graph task, the forward is gradient checkpointing's second one
        is_step = self.training and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1
        with full_precision(weight):
            wide = at_least_float32(weight)
            if is_step:
                with torch.no_grad():
                    v = nn.functional.normalize(wide @ self.u, dim=0)
                    u = nn.functional.normalize(wide.T @ v, dim=0)
                self.u, self.v = u, v  # new tensors: the graph of an earlier forward holds the old ones
            return (self.gamma / (self.v @ (wide @ self.u)) * wide).to(weight.dtype)


@contextmanager
def sigma_reparam(model: nn.Module) -> Iterator[nn.Module]:
    """All linear layers but the output head are reparametrised inside, and plain again after it, with the learnt W_hat.

    The model computes the same at first. Enter before training, so that the optimiser sees gamma; save after leaving,
    since inside the names of the weights are not those of the architecture. That also rules out vLLM's weight sync; and
    a sharded W would give the sigma of a shard. With reentrant gradient checkpointing, whose first forward has no
    gradient, u and v would stand still. ValueError where a layer is frozen, quantised, all 0 or has an adapter, and
    where there is no nn.Linear (GPT-2 has layers of its own).
    """
    tied = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    layers = {
        name: each
        for name, each in model.named_modules()
        if isinstance(each, nn.Linear) and each is not head and id(each.weight) not in tied
    }
    if not layers:
        raise ValueError(f"sigma_reparam found no nn.Linear to reparametrise in {type(model).__name__}")
    for name, layer in layers.items():
        if not layer.weight.requires_grad or not layer.weight.is_floating_point():
            raise ValueError(f"sigma_reparam trains the weights themselves, and '{name}' is frozen or quantised")
        if not layer.weight.any():
            raise ValueError(f"sigma_reparam divides by the largest singular value, and that of '{name}' is 0")
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"sigma_reparam: the weight of '{name}' is parametrised already")
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", SigmaReparam(layer.weight))
    try:
        yield model
    finally:
        training = model.training
        model.eval()  # the last u and v, as in any evaluation
        for layer in layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        model.train(training)


def attention_entropy_bound(norm: float, keys: int) -> float:
    """The least entropy, in nats, of softmax over `keys` logits whose Euclidean norm is at most `norm`; it is reached.

    log(1 + (T-1) b) + s sqrt(T (T-1)) b / (1 + (T-1) b), b = exp(-s sqrt(T / (T-1))), T = keys, s = norm. It falls
    exponentially in s: an attention whose weights grow can collapse, one whose norm is bounded cannot. Refuses a norm
    below 0 or infinite, and fewer than 2 keys.
    """
    if not (0 <= norm < math.inf and keys >= 2):
        raise ValueError(f"norm must be >= 0 and finite and keys at least 2, got {norm} and {keys}")
    others = keys - 1
    b = math.exp(-norm * math.sqrt(keys / others))
    return math.log1p(others * b) + norm * math.sqrt(keys * others) * b / (1 + others * b)
