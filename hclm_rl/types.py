"""What a term sees and what it may ask for: all that the author of a term must read.

Shapes: B responses of a micro-batch, N responses of a generation batch on this process, T response tokens,
G responses per prompt, F reward functions, D hidden width, V vocabulary. Entropies are in nats. Masks are bool,
True = counts: False on padding and on tokens that a tool wrote.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# what a term is meant to do to the entropy of the policy: raise it, lower it, or hold it at a level by its own rule
Direction = Literal["more", "less", "level"]


def no_hidden(layer: int = -1) -> Tensor:
    """Stands for the hidden states (B, T, D) of a batch that has none: refuses every call."""
    raise ValueError("this batch has no hidden states: a term that reads them declares needs_hidden = True")


def last_layer(states: Callable[[], Tensor]) -> Callable[..., Tensor]:
    """`hidden` of a batch whose last states (B, T, D), after the final norm, were kept: refuses layers but -1."""

    def hidden(layer: int = -1) -> Tensor:
        if layer != -1:
            raise ValueError(f"only layer -1, the last states after the final norm, is kept, got layer {layer}")
        return states()

    return hidden


def no_vocab(functional: Callable[[Tensor], Tensor]) -> Tensor:
    """Stands for `over_vocab`, (n, V) log-probs -> (n,), of a batch that has none: refuses every call."""
    raise ValueError(
        "this batch has no over_vocab: a term that reads it declares needs_vocab = True, and needs_vocab_gradient "
        "= True if it does so in __call__"
    )


def no_head(*_: Tensor) -> Tensor:
    """Stands for `entropy_by_head` and `slope_by_head`, (N, T), of a rollout that has neither: refuses every call."""
    raise ValueError("this rollout has no entropy_by_head, no slope_by_head: their readers declare needs_vocab = True")


def no_slope(direction: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
    """Stands for `slope`, (N, T), of a rollout that has none: refuses every call."""
    raise ValueError("this rollout has no slope: a term that reads it declares needs_vocab = True")


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """Prompts and completions as the model reads them: what `score` takes. Change a part with dataclasses.replace."""

    prompt_ids: Int[Tensor, "R P"]  # padded on the left
    prompt_mask: Bool[Tensor, "R P"]
    ids: Int[Tensor, "R T"]  # padded on the right
    present: Bool[Tensor, "R T"]  # False on padding; True on what tools wrote, unlike `mask`

    @classmethod
    def of(cls, ids: Int[Tensor, "R L"], mask: Bool[Tensor, "R L"], tail: int) -> "Transcript":
        """Whole texts, padded on the left, whose last `tail` tokens are the completion."""
        return cls(prompt_ids=ids[:, :-tail], prompt_mask=mask[:, :-tail], ids=ids[:, -tail:], present=mask[:, -tail:])


def no_score(transcript: Transcript, scorer: str = "policy") -> tuple[Tensor, Tensor]:
    """Stands for `score`, (R, T) twice, of a batch that has none: refuses every call."""
    raise ValueError("this batch has no score: a term that calls it declares needs_rescoring = True")


def no_reference_hidden() -> Tensor:
    """Stands for the states (N, T, D) of the reference in a rollout that has none: refuses every call."""
    raise ValueError(
        "this rollout has no reference_hidden: a term that calls it declares needs_rescoring = True and "
        "needs_reference_model = True"
    )


@dataclass(frozen=True, kw_only=True)
class Attention:
    """How spread out the attention was that predicted each token, in every head of every layer."""

    entropy: Float[Tensor, "B heads T"]  # nats, -sum_j a_j log a_j over the keys, with gradient unless checkpointed
    visible: Int[Tensor, "B #heads T"]  # keys that the token's query could see, in a sliding window of the layer too
    width: int  # keys of the padded batch


def no_attention() -> Attention:
    """Stands for the attention of a batch that has none: refuses every call."""
    raise ValueError("this batch has no attention entropies: a term that reads them declares needs_attention = True")


@dataclass(frozen=True, kw_only=True)
class Total:
    """A metric made of sums over the whole optimiser step and all processes: `form(*sums)`, taken once, at the end.

    `Total(sums=(dot, left, right), form=lambda dot, left, right: dot / math.sqrt(left * right))` is a cosine that does
    not depend on how the step was cut into micro-batches, as a mean of cosines would.
    """

    sums: tuple[Float[Tensor, ""], ...]
    form: Callable[..., float]


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """A metric that is logged as quantiles, over all tokens of the step and all processes: `<name>/q05` and so on."""

    values: Float[Tensor, "rows T"]
    levels: tuple[float, ...] = (0.05, 0.5, 0.95)


Metric = Tensor | Total | Quantiles  # a (rows, T) tensor is averaged over the tokens that count, a () tensor as it is


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The whole generation batch of this process, before it is shuffled and split; nothing here carries gradient."""

    ids: Int[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    advantages: Float[Tensor, "N"] | Float[Tensor, "N T"]  # as left by the first stages before
    rewards: Float[Tensor, "N"]  # weighted sum of the reward functions; NaN where none of them scored the response
    reward_parts: Float[Tensor, "N F"]
    group_rewards: Float[Tensor, "N G"]  # the rewards of all responses to the same prompt, from all processes
    group: Int[Tensor, "N"]  # number of the prompt, the same on all processes
    reward_scale: Float[Tensor, "N"]  # what the base algorithm divides centred rewards by; 1 where it does not scale
    logps: Float[Tensor, "N T"] | None = None  # log pi(token) of the sampling policy; None unless a term needs_scores
    entropy: Float[Tensor, "N T"] | None = None  # nats, at the sampling temperature; None unless a term needs_scores
    ref_logps: Float[Tensor, "N T"] | None = None
    beta: float = 0.0  # of the base algorithm's KL penalty to the model of ref_logps
    loss_mean: Literal["tokens", "sequences"] = "tokens"  # what the policy loss averages: tokens, or means of responses
    # what the policy loss multiplies each token's by, where the sampler's log-probs differ; 0: masked by it
    sampler_ratio: Float[Tensor, "N T"] | Float[Tensor, "N 1"] | None = None
    prompts: list = field(default_factory=list)  # text, or the messages of a chat
    texts: list = field(default_factory=list)  # of the completions, or their messages
    rows: list = field(default_factory=list)  # {column: value} of the data set, one a response
    tokenizer: Any = None  # what made the ids, as transformers has it
    progress: float = 0.0  # share of the training done, in [0, 1]
    step: int = 0  # optimiser step
    generator: torch.Generator = field(default_factory=torch.Generator)  # the same state on every process
    # hidden() -> (N, T, D): the last states, those that PREDICTED each token; 0 in the padding. A copy: `states` is not
    hidden: Callable[..., Tensor] = no_hidden
    packed: Callable[[], Tensor] | None = None  # hidden()[mask] as the trainer keeps it, for `states`
    # what `sampled_moments` names, where the states were not kept: for `moments_of_step` and `means_of_step`
    passed: Mapping[Callable, Any] | None = None
    # over_vocab(f), f: (n, V) log-probs of the sampling policy -> (n,), gives (N, T) without gradient, in chunks
    # (vocab.py); 0 off the mask. f -> (n, K) gives (N, T, K): K functionals at the price of one
    over_vocab: Callable[[Callable[[Tensor], Tensor]], Tensor] = no_vocab
    # slope(direction (N, T, D)) -> (N, T): d log pi(token) as its hidden state moves along `direction`; 0 off the mask.
    # Also of a function, some tokens' states (n, D) -> their directions (n, D): those of all are then never held
    slope: Callable[[Tensor | Callable[[Tensor], Tensor]], Tensor] = no_slope
    # entropy_by_head(mask (N, T)) -> (V, D): d sum of the entropies under it / d weight of the output head, of this
    # process; slope_by_head(direction (V, D), mask) -> (N, T): d log pi(token) as that weight moves, 0 off the mask
    entropy_by_head: Callable[[Tensor], Tensor] = no_head
    slope_by_head: Callable[[Tensor, Tensor], Tensor] = no_head
    transcript: Transcript | None = None  # this process's rows as the model reads them; None unless needs_rescoring
    # score(transcript, scorer) -> (log-probs, entropies in nats), each (rows, T), of the completions of any texts, at
    # the sampling temperature and without gradient. scorer: "policy" as it is, or "reference", the frozen model of the
    # KL penalty. A forward pass: the same number of calls on every process.
    score: Callable[..., tuple[Tensor, Tensor]] = no_score
    # reference_hidden() -> (N, T, D): the last states of the frozen model of the KL penalty AT each token, not those
    # that predicted it. A forward pass, as `score`.
    reference_hidden: Callable[[], Tensor] = no_reference_hidden
    # everywhere(x): (N, ...) -> the rows of all processes, T padded to the widest
    everywhere: Callable[[Tensor], Tensor] = lambda x: x
    here: Callable[[Tensor], Tensor] = lambda x: x  # the inverse of `everywhere`: this process's rows, cut to its T
    total: Callable[[Tensor], Tensor] = lambda x: x  # the sum of x over all processes

    def states(self) -> Float[Tensor, "M D"]:
        """The last states of the M tokens that count, in the order of the mask: `hidden()[mask]`. Not to be changed."""
        return self.hidden()[self.mask] if self.packed is None else self.packed()

    def scored(self) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
        """(logps, entropy) of the sampling policy; refuses a rollout that was not scored."""
        if self.logps is None or self.entropy is None:
            raise ValueError("this rollout was not scored: a term that reads log-probs declares needs_scores = True")
        return self.logps, self.entropy


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """One micro-batch, with the log-probs, entropies and hidden states of the policy as it is now."""

    ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    logps: Float[Tensor, "B T"]  # log pi(token), with gradient
    old_logps: Float[Tensor, "B T"]  # under the sampling policy, detached
    entropy: Float[Tensor, "B T"]  # nats, of the full distribution at the sampling temperature, with gradient
    advantages: Float[Tensor, "B T"]  # as left by the terms before this one, detached
    ref_logps: Float[Tensor, "B T"] | None = None
    rewards: Float[Tensor, "B"]
    group_rewards: Float[Tensor, "B G"]
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # what this term's on_rollout attached, row by row
    shared: Mapping[str, Tensor] = field(default_factory=dict)  # what this term's on_rollout attached for all rows
    clip_range: tuple[float, float] = (0.2, 0.2)  # epsilon_low, epsilon_high of the base algorithm
    is_clipped: Bool[Tensor, "B T"] | None = None  # tokens without gradient; None where the loss clips none
    coef: float = 1.0  # the link's strength in this step, by which the trainer multiplies the loss that is asked for
    progress: float = 0.0
    step: int = 0
    # of the generation batch in this optimiser step: its loss is a mean over so many of the tokens (on average)
    share: float = 1.0
    generator: torch.Generator = field(default_factory=torch.Generator)  # the only source of randomness of a term
    hidden: Callable[..., Tensor] = no_hidden  # hidden() -> (B, T, D): the last states, with gradient
    attention: Callable[[], Attention] = no_attention
    # over_vocab(f), f: (n, V) log-probs -> (n,), gives (B, T) with gradient, 0 off the mask
    over_vocab: Callable[[Callable[[Tensor], Tensor]], Tensor] = no_vocab
    score: Callable[..., tuple[Tensor, Tensor]] = no_score  # as in Rollout, with gradient for the policy


@dataclass(frozen=True, kw_only=True)
class RolloutEffect:
    """What a term asks for in stage 1; a field left out leaves that part alone."""

    rewards: Float[Tensor, "N"] | None = None  # the base algorithm's own normalisation is then repeated on them
    # with `rewards`, True: the response has no part in that normalisation and gets advantage 0, as an unscored one
    is_left_out: Bool[Tensor, "N"] | None = None
    advantages: Float[Tensor, "N"] | Float[Tensor, "N T"] | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # (N, ...): travel to stage 2 with their rows
    shared: Mapping[str, Tensor] = field(default_factory=dict)  # any shape, the same for all rows
    metrics: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a term asks for in stage 2; a field left out leaves that part alone."""

    advantages: Float[Tensor, "B T"] | None = None  # a token weight w >= 0 or a mask is w * A
    loss: Float[Tensor, "B T"] | Float[Tensor, ""] | None = None  # (B, T): averaged over the optimiser step; (): as is
    affected: Bool[Tensor, "B T"] | None = None  # tokens that a loss acts on though its value there is 0
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    # Called in the backward pass with the gradient (B, T, D) that reaches the hidden states through the output head,
    # scaled as in the optimiser step's loss; gives metrics. Needs `needs_hidden`.
    on_hidden_gradient: Callable[[Tensor], Mapping[str, Metric]] | None = None


@dataclass(frozen=True, kw_only=True)
class Term:
    """An entropy-control method. Subclass it as a frozen dataclass: the fields are its hyper-parameters and its YAML.

    A term does not average, log, move devices, draw from the global generator, or change what it is given. `memory` is
    its own state between steps: numbers, lists of numbers and tensors, saved with the checkpoint. It must be the same
    on all processes, so change it only by what is the same on all (`Rollout.everywhere`, `Rollout.total`).
    """

    needs_scores: ClassVar[bool] = False  # stage 1 reads logps or entropy of the sampling policy
    needs_hidden: ClassVar[bool] = False  # reads hidden states
    needs_vocab: ClassVar[bool] = False  # stage 1 reads the whole next-token distribution (over_vocab, slope)
    needs_vocab_gradient: ClassVar[bool] = False  # stage 2 reads it, with gradient: not under ZeRO-3
    needs_rescoring: ClassVar[bool] = False  # calls `score` on other texts, or reads `transcript`
    rescores_in_loss: ClassVar[bool] = False  # of needs_rescoring: calls `score` in stage 2 alone, so stage 1 may wait
    needs_reference_model: ClassVar[bool] = False  # runs the frozen model of the KL penalty: `beta` above 0
    needs_attention: ClassVar[bool] = False  # stage 2 reads attention entropies: eager attention alone gives them
    needs_reference: ClassVar[bool] = False  # reads `ref_logps` of GRPO's KL penalty: `beta` above 0
    least_group: ClassVar[int] = 2  # responses to a prompt without which it can do nothing
    is_diagnostic: ClassVar[bool] = False  # gives metrics alone
    inert_on_policy: ClassVar[bool] = False  # does nothing when each rollout is used for one update only
    seeks: ClassVar[Direction | None] = None  # None: neither, or it depends on the batch
    needs_token_clip: ClassVar[bool] = False  # takes the place of what PPO's clip of a token's ratio drops
    sets_baseline: ClassVar[bool] = False  # makes the advantages anew from the rewards, with a baseline of its own
    centres: ClassVar[bool] = False  # takes a mean off the advantages that it is given
    # stage 1 gives rewards, of which the advantages are then made anew: such terms come before the next kind
    shapes_rewards: ClassVar[bool] = False
    shapes_advantages: ClassVar[bool] = False  # stage 1 gives advantages
    # the link's coefficient where the recipe names none: a number, or a mapping as a recipe has it
    default_coef: ClassVar[float | Mapping[str, object]] = 1.0

    def caveats(self) -> list[str]:
        """What of its hyper-parameters works against the user where it trains, a sentence each."""
        return []

    def vocab_functionals(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """What stage 1 gives to `over_vocab`, (n, V) -> (n,), if known before: all links share one pass's logits."""
        return ()

    def sampled_moments(self) -> tuple[Callable[..., Tensor], ...]:
        """What stage 1 gives to `moments_of_step`, from (n, D) to (n, D), if it reads no states else: none are kept.

        `rows.mean_of_responses` stands for what `means_of_step` gives.
        """
        return ()

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        """Stage 1, once per generation batch: rewards, advantages, statistics of the whole step."""
        return RolloutEffect()

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        """Stage 2, once per micro-batch: token weights, masks, losses."""
        return Effect()

    def on_step(self, metrics: Mapping[str, float], memory: dict) -> None:
        """After an optimiser step: what stage 2 made of it, over its micro-batches and all processes."""
