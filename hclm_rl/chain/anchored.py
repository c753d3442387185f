"""Controllers whose target is a share of the entropy that the policy began with"""

from dataclasses import dataclass

from .schedules import State, require_numbers


@dataclass(frozen=True, kw_only=True)
class Aer:
    """Raises an entropy bonus while the entropy is below a share of that of the first step, and takes it off above.

    AER, Adaptive Entropy Regularization: 2025, arXiv:2510.10959. After each optimiser step
    c <- clip(c + eta (tau H_0 - H), 0, maximum), H the mean entropy of its tokens and H_0 that of the first step; c
    acts in the next one.

    Only that there is a global factor, a target set relative to the start, and a coefficient by the difficulty of the
    prompt (`entropy_bonus` with `by_difficulty: true`) was at hand: no formula of the paper was read. This form and all
    its values are ours. An integral without a proportional part overshoots: `proportional_integral` has one.
    """

    tau: float = (
        0.4  # target as a share of H_0, in (0, 1); ours, since the paper's best lies moderately below the start
    )
    eta: float = 0.005  # per nat and step, > 0; ours
    start: float = 0.0  # in [0, maximum]; ours
    maximum: float = 0.02  # ours; from about 1e-2 on a bonus explodes the entropy (arXiv:2505.22617)

    def __post_init__(self) -> None:
        require_numbers(self, "tau", "eta", "start", "maximum")
        if not 0 < self.tau < 1:
            raise ValueError(f"tau is a share of the first step's entropy, in (0, 1), got {self.tau}")
        if not self.eta > 0:
            raise ValueError(f"eta must be positive, got {self.eta}; for no control give a number as coef")
        if not 0 <= self.start <= self.maximum:
            raise ValueError(f"0 <= start <= maximum must hold, got start {self.start} and maximum {self.maximum}")

    @property
    def needs_entropy(self) -> bool:
        return False

    def initial_state(self) -> State:
        return {"coefficient": self.start}

    def value(self, progress: float, state: State, entropy: float | None = None) -> float:
        return state["coefficient"]

    def update(self, entropy: float, state: State) -> State:
        first = state.get("first_entropy", entropy)
        moved = state["coefficient"] + self.eta * (self.tau * first - entropy)
        return {"coefficient": min(max(moved, 0.0), self.maximum), "first_entropy": first}
