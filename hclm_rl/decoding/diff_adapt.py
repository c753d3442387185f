"""DiffAdapt, a budget by the difficulty that a probe reads off the prompt: 2025, arXiv:2510.19669"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Difficulty = Literal["easy", "normal", "hard"]
KINDS: tuple[Difficulty, ...] = ("easy", "normal", "hard")


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a question of a kind is answered.

    Args:
        temperature: at least 0
        share: of the longest response that is allowed, in (0, 1]
        template: text with `{prompt}`, in place of the prompt
    """

    temperature: float = 1.0
    share: float = 1.0
    template: str = "{prompt}"

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf):
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")
        if "{prompt}" not in self.template:
            raise ValueError(f"template must hold {{prompt}}, got {self.template!r:.80}")


@dataclass(frozen=True, kw_only=True)
class DiffAdapt:
    """Asks a probe of the prompt's last hidden state how hard the question is, and takes temperature and budget by it.

    Labels for the probe come from samples of the model, by its share of right answers r and its mean token entropy H:
    hard if r < correct_below, else easy if H > entropy_above (much thought about what it can do), else normal. The
    paper names the kinds and says that both ends have a high entropy; this rule is inferred from that. The thresholds
    are a model's own. The network is not changed.

    Args:
        correct_below: share of right answers, in [0, 1]
        entropy_above: nats, at least 0
        easy: the paper's temperature and share
        normal: the paper's
        hard: the paper's
    """

    correct_below: float
    entropy_above: float
    easy: Strategy = field(default_factory=lambda: Strategy(temperature=0.5, share=0.4))
    normal: Strategy = field(default_factory=lambda: Strategy(temperature=0.8, share=1.0))
    hard: Strategy = field(default_factory=lambda: Strategy(temperature=0.4, share=0.5))

    def __post_init__(self) -> None:
        if not 0 <= self.correct_below <= 1:
            raise ValueError(f"correct_below must be in [0, 1], got {self.correct_below}")
        if not (0 <= self.entropy_above < math.inf):
            raise ValueError(f"entropy_above must be at least 0 and finite, got {self.entropy_above}")

    def label(self, correct: float, entropy: float) -> Difficulty:
        """Of a question whose samples have this share of right answers and this mean token entropy (nats)."""
        if correct < self.correct_below:
            return "hard"
        return "easy" if entropy > self.entropy_above else "normal"

    def strategy(self, kind: Difficulty) -> Strategy:
        """The settings for prompts of this difficulty."""
        return {"easy": self.easy, "normal": self.normal, "hard": self.hard}[kind]


class Probe(nn.Module):
    """softmax(W2 relu(W1 x + b1) + b2) of the standardised state x, over easy, normal, hard."""

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, len(KINDS)))

    def forward(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N 3"]:
        return self.layers((states - self.mean) / self.scale)

    @torch.no_grad()
    def kinds(self, states: Float[Tensor, "N D"]) -> list[Difficulty]:
        """The likeliest difficulty of each row. Refuses states of another width than those that it was fitted on."""
        if states.shape[1] != len(self.mean):
            raise ValueError(
                f"the probe reads states of {len(self.mean)} numbers, and this model's have {states.shape[1]}: fit one "
                "for this model"
            )
        return [KINDS[i] for i in self(states.float().cpu()).argmax(dim=1).tolist()]


def fit_probe(
    states: Float[Tensor, "N D"], kinds: Sequence[Difficulty], *, hidden: int = 64, steps: int = 300, seed: int = 0
) -> Probe:
    """Cross-entropy by Adam over all questions at once; the global generator is left as it was.

    Refuses no state, and unequal numbers of states and kinds.
    """
    if len(states) != len(kinds) or not len(kinds):
        raise ValueError(f"a probe needs one state a question and at least one, got {len(states)} and {len(kinds)}")
    states = states.detach().float().cpu()
    targets: Int[Tensor, "N"] = torch.tensor([KINDS.index(each) for each in kinds])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        probe = Probe(states.shape[1], hidden)
    probe.mean.copy_(states.mean(dim=0))
    probe.scale.copy_(states.std(dim=0, unbiased=False).clamp(min=1e-6))
    optimizer = torch.optim.Adam(probe.parameters(), lr=1e-2, weight_decay=1e-4)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(probe(states), targets).backward()
            optimizer.step()
    return probe.eval().requires_grad_(False)


def save_probe(probe: Probe, path: Path) -> None:
    """As safetensors, for `load_probe`."""
    save_file({name: value.contiguous() for name, value in probe.state_dict().items()}, path)


def load_probe(path: Path) -> Probe:
    """One sentence where there is none, or where the file is something else. Refuses both with a ValueError."""
    if not path.is_file():
        raise ValueError(f"no probe at '{path}': fit one first")
    try:
        weights: Mapping[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is no probe: {error}") from error
    try:
        hidden, width = weights["layers.0.weight"].shape
        probe = Probe(width, hidden)
        probe.load_state_dict(dict(weights))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"'{path}' is no probe: it has {', '.join(sorted(weights))[:80]}") from error
    return probe.eval().requires_grad_(False)
