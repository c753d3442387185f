"""What `decoding` of a recipe means: from a name with hyper-parameters to responses and what they cost."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, PreTrainedModel

from ..decoding.activation_steering import ActivationSteering, last_states, responses_under
from ..decoding.adaptive_temperature import AdaptiveTemperature
from ..decoding.diff_adapt import KINDS, DiffAdapt, Strategy, load_probe
from ..decoding.edt import Edt
from ..decoding.em_inf import EmInf
from ..decoding.model_switching import ModelSwitching, switched
from ..decoding.power_sampling import PowerSampling
from ..decoding.rows import Drawn, draw, within_context
from ..decoding.stable_entropy import StableEntropy
from ..evaluation.tasks import Prompt
from ..recipe.named import filled, named_entry, refuse_unknown

PROCESSORS = {
    "edt": Edt,
    "adaptive_temperature": AdaptiveTemperature,
    "em_inf": EmInf,
    "stable_entropy": StableEntropy,
}
DECODERS = (*sorted([*PROCESSORS, "activation_steering", "diff_adapt", "model_switching", "power_sampling"]),)


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model and how it is drawn from, whatever the method."""

    model: PreTrainedModel
    encode: Callable[[Prompt], list[int]]
    ends: list[int]
    pad: int
    longest: int  # tokens of a response
    temperature: float

    def draw(self, prompts: Sequence[Sequence[int]], streams: Sequence[random.Random], **more: Any) -> list[Drawn]:
        given = {"temperature": self.temperature, **more}
        limits = given.pop("limits", [self.longest] * len(prompts))
        return draw(self.model, prompts, streams, limits, ends=self.ends, pad=self.pad, **given)


class Decoder:
    """Plain sampling; what a method does in its place stands below."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.extra_tokens = 0  # drawn beside the responses' own

    def __call__(self, prompts: Sequence[Prompt], streams: Sequence[random.Random]) -> list[Drawn]:
        return self.base.draw([self.base.encode(prompt) for prompt in prompts], streams)

    def report(self) -> dict[str, float]:
        """What it cost or did, over all responses so far."""
        return {}


class Processed(Decoder):
    def __init__(self, base: Base, make: Callable[[int], LogitsProcessor]) -> None:
        super().__init__(base)
        self.make = make  # from the prompts' padded length

    def __call__(self, prompts: Sequence[Prompt], streams: Sequence[random.Random]) -> list[Drawn]:
        ids = [self.base.encode(prompt) for prompt in prompts]
        found = [Drawn() for _ in ids]
        for rows in within_context(self.base.model, ids, [self.base.longest] * len(ids)):
            mine = [ids[i] for i in rows]
            processor = self.make(max(map(len, mine)))
            drawn = self.base.draw(mine, [streams[i] for i in rows], processors=[processor])
            for i, each in zip(rows, drawn, strict=True):
                found[i] = each
        return found


class Power(Decoder):
    def __init__(self, base: Base, settings: PowerSampling) -> None:
        super().__init__(base)
        self.settings, self.moves, self.accepted = settings, 0, 0
        if base.temperature != 1:
            raise ValueError(f"power_sampling needs temperature 1, got {base.temperature}")

    def __call__(self, prompts: Sequence[Prompt], streams: Sequence[random.Random]) -> list[Drawn]:
        base, ids = self.base, [self.base.encode(prompt) for prompt in prompts]
        found = self.settings(base.model, ids, streams, max_new_tokens=base.longest, ends=base.ends, pad=base.pad)
        for each in found:
            self.extra_tokens += each.tokens - len(each.response.ids)
            self.moves, self.accepted = self.moves + each.moves, self.accepted + each.accepted
        return [each.response for each in found]

    def report(self) -> dict[str, float]:
        return {"moves_accepted": self.accepted / self.moves if self.moves else 0.0}


class Switching(Decoder):
    """The recipe's model is the small one."""

    def __init__(self, base: Base, settings: ModelSwitching, large: PreTrainedModel) -> None:
        super().__init__(base)
        self.settings, self.large = settings, large
        self.parameters = (base.model.num_parameters(), large.num_parameters())
        self.tokens = self.by_large = 0
        self.computed: list[float] = []

    def __call__(self, prompts: Sequence[Prompt], streams: Sequence[random.Random]) -> list[Drawn]:
        responses = []
        for prompt, stream in zip(prompts, streams, strict=True):
            ids = self.base.encode(prompt)
            found = switched(
                self.settings, self.base.model, self.large, ids, stream,
                max_new_tokens=self.base.longest, ends=self.base.ends, temperature=self.base.temperature,
            )  # fmt: skip
            self.tokens, self.by_large = self.tokens + len(found.is_large), self.by_large + sum(found.is_large)
            self.computed.append(found.compute(*self.parameters, prompt=len(ids)))
            responses.append(found.response)
        return responses

    def report(self) -> dict[str, float]:
        compute = sum(self.computed) / max(len(self.computed), 1)
        return {"large_tokens": self.by_large / max(self.tokens, 1), "compute_saved": 1 - compute}


def within(template: str, prompt: Prompt) -> Prompt:
    """The prompt in the place of `{prompt}`; of messages, what the last one says."""
    if isinstance(prompt, str):
        return template.replace("{prompt}", prompt)
    *before, last = prompt
    return [*before, {**last, "content": template.replace("{prompt}", last["content"])}]


class Adapted(Decoder):
    def __init__(self, base: Base, settings: DiffAdapt, probe: Path) -> None:
        super().__init__(base)
        if base.temperature != 1:
            raise ValueError(
                f"diff_adapt takes the temperature of each question by its kind, got {base.temperature}: leave "
                "temperature at 1, and set that of easy, normal and hard"
            )
        self.settings, self.probe, self.counts = settings, load_probe(probe), dict.fromkeys(KINDS, 0)

    def __call__(self, prompts: Sequence[Prompt], streams: Sequence[random.Random]) -> list[Drawn]:
        base, ids = self.base, [self.base.encode(prompt) for prompt in prompts]
        layers = base.model.config.get_text_config().num_hidden_layers
        kinds = self.probe.kinds(last_states(base.model, ids, layers - 1, base.pad))
        found: dict[int, Drawn] = {}
        for kind in KINDS:
            mine, strategy = [i for i, each in enumerate(kinds) if each == kind], self.settings.strategy(kind)
            self.counts[kind] += len(mine)
            if mine:
                drawn = base.draw(
                    [base.encode(within(strategy.template, prompts[i])) for i in mine],
                    [streams[i] for i in mine],
                    limits=[max(1, int(strategy.share * base.longest))] * len(mine),
                    temperature=strategy.temperature,
                )
                found.update(zip(mine, drawn, strict=True))
        return [found[i] for i in range(len(prompts))]

    def report(self) -> dict[str, float]:
        total = max(sum(self.counts.values()), 1)
        return {f"{kind}_questions": count / total for kind, count in self.counts.items()}


class Steered(Decoder):
    def __init__(self, base: Base, settings: ActivationSteering, file: Path) -> None:
        super().__init__(base)
        if not file.is_file():
            raise ValueError(f"no vector at '{file}': make one first, docs/decoding.md")
        if base.temperature != 1:
            raise ValueError(f"activation_steering draws at temperature 1, got {base.temperature}")
        self.settings, self.vector = settings, vector_in(file, base.model.config.get_text_config().hidden_size)
        self.lengths: list[float] = []

    def __call__(self, prompts: Sequence[Prompt], streams: Sequence[random.Random]) -> list[Drawn]:
        base, ids = self.base, [self.base.encode(prompt) for prompt in prompts]
        states = last_states(base.model, ids, self.settings.layer, base.pad)
        self.lengths.append(self.settings.relative(self.vector, states.to(self.vector)))
        limits = [base.longest] * len(ids)
        return responses_under(
            self.settings, base.model, self.vector, ids, streams, limits, ends=base.ends, pad=base.pad
        )

    def report(self) -> dict[str, float]:
        return {"relative_strength": sum(self.lengths) / max(len(self.lengths), 1)}


def vector_in(file: Path, width: int) -> Tensor:
    """The tensor `vector` (width,) of a safetensors file; a ValueError where it is something else."""
    try:
        vector = load_file(file).get("vector")
    except SafetensorError as error:
        raise ValueError(f"'{file}' is no safetensors file: {error}") from error
    if vector is None:
        raise ValueError(f"'{file}' holds no tensor named vector")
    if vector.shape != (width,) or not vector.isfinite().all():
        raise ValueError(
            f"the vector in '{file}' must have {width} finite numbers, as the states of this model, got shape "
            f"{tuple(vector.shape)}{'' if vector.isfinite().all() else ' with some that are not finite'}"
        )
    return vector


def taken(given: dict[str, Any], name: str, key: str, what: str) -> str:
    """A path among the hyper-parameters that is the command's, not the method's."""
    value = given.pop(key, None)
    if not isinstance(value, str):
        raise ValueError(f"{name} needs {key}, {what}, got {value!r:.80}")
    return value


def adapted(given: Mapping[str, Any]) -> DiffAdapt:
    """With each kind's strategy as a mapping of its own, over the paper's."""
    whole, start = dict(given), DiffAdapt(correct_below=0.0, entropy_above=0.0)
    for kind in KINDS:
        if isinstance(whole.get(kind), Mapping):
            own = {each.name for each in fields(Strategy)} - set(whole[kind])
            defaults = {key: value for key, value in asdict(start.strategy(kind)).items() if key in own}
            whole[kind] = filled(Strategy, f"diff_adapt: {kind}", {**defaults, **whole[kind]})
    return filled(DiffAdapt, "diff_adapt", whole)


def decoder_of(entry: object, base: Base) -> Decoder:
    """`decoding` as the recipe has it; a ValueError says what is wrong with it in one sentence."""
    if entry is None:
        return Decoder(base)
    name, given = named_entry(entry, "decoding")
    refuse_unknown(name, DECODERS, "decoding")
    if name == "stable_entropy":
        make = filled(StableEntropy, name, given, without=("prompt_length",))
        make(prompt_length=1)  # says what is wrong
        return Processed(base, lambda width: make(prompt_length=width))
    if name in PROCESSORS:
        processor = filled(PROCESSORS[name], name, given)
        return Processed(base, lambda _: processor)
    if name == "power_sampling":
        return Power(base, filled(PowerSampling, name, given))
    if name == "model_switching":
        path = taken(given, name, "large", "the folder or name of the large model")
        settings = filled(ModelSwitching, name, given)
        try:
            large = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
            large.to(base.model.device)  # pyright: ignore[reportArgumentType]  (typed as a call)
        except (OSError, ValueError) as error:
            raise ValueError(f"the model '{path}' could not be loaded: {' '.join(str(error).split())}") from error
        return Switching(base, settings, large)
    if name == "diff_adapt":
        path = taken(given, name, "probe", "a file that fit_probe made")
        return Adapted(base, adapted(given), Path(path))
    path = taken(given, name, "vector", "a safetensors file with the tensor of that name")
    return Steered(base, filled(ActivationSteering, name, given), Path(path))
