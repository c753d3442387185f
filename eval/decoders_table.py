"""Methods of decoding on one model and task: what they get right, how different it is, what they draw and compute.

    python eval/decoders_table.py --task smollm2_sums --model models/smollm2-135m
    python eval/decoders_table.py --task coins --samples 32 --only plain em_inf power_sampling
    python eval/decoders_table.py --task coins --table                     # decodes nothing

Problems are those of the test split; what a method must know of the model is made on the validation split, whose
problems differ: the zone of `stable_entropy` (the model's entropies on the prompts' text), the probe of `diff_adapt`
(samples of each problem), the vector of `activation_steering` (a prompt and the prompt with one token more are the two
steps, the final answer is the action). `model_switching` needs a second model that shares the tokenizer: here the first
--draft_layers layers of the model, trained to write what the model wrote to other problems. Nothing is chosen: values
are the recipes' (recipes/generate), but for `model_switching` and `edt`, of which several are shown. One seed; the
deviation is that of the mean over problems. Seconds are of one core, of decoding alone.
"""

import argparse
import copy
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from many_runs import write
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hclm_rl.commands.decoders import Base, decoder_of
from hclm_rl.commands.generate import GenerateArguments, answered, summary_of
from hclm_rl.decoding.activation_steering import ActivationSteering, action_entropy, last_states, steering_vector
from hclm_rl.decoding.diff_adapt import DiffAdapt, fit_probe, save_probe
from hclm_rl.decoding.rows import streams_of
from hclm_rl.decoding.stable_entropy import fit_zone
from hclm_rl.equations.temperature import entropy_of
from hclm_rl.evaluation.tasks import Problem, Source, load
from hclm_rl.responses.outcomes import pass_at_k
from hclm_rl.testbed.policy import policy_path

RECIPES = Path(__file__).parent.parent / "recipes/generate"
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "coins": ("coins", {"prompts": 256, "eval_prompts": 96}),
    "smollm2_sums": ("arithmetic", {"problem": "sums", "prompts": 400, "eval_prompts": 48, "max_digits": 2}),
}
SHARES = (0.1, 0.25, 0.5)  # of the states' length, which the added vector has: the recipe's strength is one model's
THRESHOLDS = (0.5, 1.0, 1.5)  # bits, of the last token: answers are too short for a window of 5 and a stay of 10


def of_recipe(name: str) -> dict[str, Any]:
    """The hyper-parameters of a recipe, without files."""
    given = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["decoding"][name]
    return {key: value for key, value in given.items() if key not in ("large", "probe", "vector")}


def problems_of(task: str, split: str) -> tuple[list[Problem], int]:
    """(problems, longest response in tokens) of a split."""
    name, kwargs = TASKS[task]
    found = load(Source(task=name, kwargs={**kwargs, "eval_split": split}))
    return found.problems, found.max_new_tokens


def draft_of(base: Base, prompts: Sequence[list[int]], layers: int, steps: int, seed: int) -> PreTrainedModel:
    """The model's first layers, trained on what the whole one wrote behind the prompts."""
    said = base.draw(prompts, streams_of(seed, [f"draft {i}" for i in range(len(prompts))]))
    rows = [(list(prompt), each.ids) for prompt, each in zip(prompts, said, strict=True)]
    draft = copy.deepcopy(base.model)
    draft.model.layers = draft.model.layers[:layers]
    draft.config.num_hidden_layers = layers
    optimizer = torch.optim.AdamW(draft.parameters(), lr=5e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    draft.train()
    for _ in range(steps):
        batch = [rows[i] for i in torch.randperm(len(rows), generator=generator)[:16].tolist()]
        width = max(len(prompt) + len(ids) for prompt, ids in batch)
        ids, labels = torch.full((16, width), base.pad), torch.full((16, width), -100)
        mask = torch.zeros((16, width), dtype=torch.long)
        for row, (prompt, said_ids) in enumerate(batch):
            whole = torch.tensor(prompt + said_ids)
            ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
            labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
        loss = draft(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return draft.eval()


def zone_of(base: Base, prompts: Sequence[list[int]]) -> dict[str, float]:
    """Bounds of `stable_entropy`: the model's entropies on the prompts' text."""
    width = max(map(len, prompts))
    ids = torch.tensor([[*each, *[base.pad] * (width - len(each))] for each in prompts])
    mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in prompts])
    with torch.no_grad():
        entropies = entropy_of(base.model(input_ids=ids, attention_mask=mask).logits[:, :-1])
    mean, deviation = fit_zone(entropies, mask[:, 1:].bool())
    return {"mean": mean, "deviation": deviation}


def make_probe(base: Base, asked: Sequence[Problem], tokenizer: Any, samples: int, file: Path) -> dict[str, Any]:
    """The probe of `diff_adapt` in a file, and the settings that its labels were made with."""
    options = GenerateArguments(model_name_or_path="-", task="-", samples=samples, batch=512, seed=7)
    rows = answered(options, list(asked), decoder_of(None, base), tokenizer)
    of = [[row for row in rows if row["number"] == i] for i in range(len(asked))]
    shares = [statistics.mean(row["is_right"] for row in each) for each in of]
    entropies = [
        sum(row["entropy"] * row["tokens"] for row in each) / sum(row["tokens"] for row in each) for each in of
    ]
    bounds = {"correct_below": of_recipe("diff_adapt")["correct_below"], "entropy_above": statistics.median(entropies)}
    settings = DiffAdapt(**bounds)
    layers = base.model.config.get_text_config().num_hidden_layers
    states = last_states(base.model, [base.encode(each.prompt) for each in asked], layers - 1, base.pad)
    save_probe(fit_probe(states, [settings.label(*each) for each in zip(shares, entropies, strict=True)]), file)
    return {**bounds, "probe": str(file)}


def make_vector(
    base: Base, asked: Sequence[Problem], tokenizer: Any, completions: int, file: Path
) -> tuple[int, float]:
    """The vector of `activation_steering` in a file, of two steps a problem; (layer, strength of share 1)."""
    layer = base.model.config.get_text_config().num_hidden_layers // 2
    firsts = [base.encode(each.prompt) for each in asked]
    more = base.draw(firsts, streams_of(3, [f"step {i}" for i in range(len(firsts))]))
    steps = [firsts, [[*ids, each.ids[0]] for ids, each in zip(firsts, more, strict=True)]]
    states, entropies = [], []
    for number, prompts in enumerate(steps):
        rows = [ids for ids in prompts for _ in range(completions)]
        said = base.draw(rows, streams_of(5, [f"{number} {i}" for i in range(len(rows))]))
        texts = tokenizer.batch_decode([each.ids for each in said], skip_special_tokens=True)
        # of the second step the first token belongs to the answer, too
        heads = [tokenizer.decode(each.ids[:1]) if number else "" for each in more]
        answers = [asked[i // completions].judge(heads[i // completions] + text)[0] for i, text in enumerate(texts)]
        groups = [answers[at : at + completions] for at in range(0, len(answers), completions)]
        entropies.append([action_entropy(each) for each in groups])
        states.append(last_states(base.model, prompts, layer, base.pad))
    vector = steering_vector(torch.stack(states, dim=1), torch.tensor(entropies).T.to(states[0]))
    save_file({"vector": vector}, file)
    return layer, 1 / ActivationSteering(strength=1.0, layer=layer).relative(vector, states[0])


Made = tuple[Base, Any]  # whose model, and `decoding` as a recipe has it


def rows_to_make(base: Base, asked: Sequence[Problem], tokenizer: Any, options: Any) -> dict[str, Callable[[], Made]]:
    """What each row of the table decodes with; what a method needs of the model is made when its row is."""
    prompts = [base.encode(each.prompt) for each in asked]
    files = options.out / options.task
    files.mkdir(parents=True, exist_ok=True)

    def cooler(temperature: float) -> Made:
        return dataclasses.replace(base, temperature=temperature), None

    def adapted() -> Made:
        probe = make_probe(base, asked, tokenizer, options.samples, files / "probe.safetensors")
        return base, {"diff_adapt": probe}

    @functools.cache
    def vector() -> tuple[int, float]:
        return make_vector(base, asked, tokenizer, 8, files / "vector.safetensors")

    def steered(share: float) -> Made:
        layer, whole = vector()
        given = {"vector": str(files / "vector.safetensors"), "layer": layer, "strength": share * whole}
        return base, {"activation_steering": given}

    @functools.cache
    def draft() -> Base:
        model = draft_of(base, prompts, options.draft_layers, options.draft_steps, seed=11)
        return dataclasses.replace(base, model=model)

    def switching(threshold: float) -> Made:
        given = {"large": str(options.model), "threshold": threshold, "window": 1, "stay": 0}
        return draft(), {"model_switching": given}

    rows: dict[str, Callable[[], Made]] = {"plain": lambda: (base, None)}
    rows |= {f"temperature {t}": functools.partial(cooler, t) for t in (0.7, 0.4)}
    for name in ("edt", "em_inf", "adaptive_temperature", "power_sampling"):
        rows[name] = functools.partial(lambda name: (base, {name: of_recipe(name)}), name)
    rows["edt, theta 1"] = lambda: (base, {"edt": {"theta": 1.0}})
    rows["stable_entropy"] = lambda: (
        base,
        {"stable_entropy": {**of_recipe("stable_entropy"), **zone_of(base, prompts)}},
    )
    rows["diff_adapt"] = adapted
    rows |= {f"activation_steering, {share:g}": functools.partial(steered, share) for share in SHARES}
    if options.draft_layers:
        rows["the draft alone"] = lambda: (draft(), None)
        rows |= {f"model_switching, {bits:g} bits": functools.partial(switching, bits) for bits in THRESHOLDS}
    return rows


def measured(base: Base, decoding: Any, asked: list[Problem], tokenizer: Any, options: Any) -> dict[str, Any]:
    """One row: means over the responses, deviations over problems, what was drawn."""
    decoder = decoder_of(decoding, base)
    given = GenerateArguments(model_name_or_path="-", task="-", samples=options.samples, batch=512, seed=options.seed)
    start = time.process_time()
    rows = answered(given, asked, decoder, tokenizer)
    seconds = time.process_time() - start
    right, distinct = defaultdict(int), defaultdict(set)
    for row in rows:
        right[row["number"]] += row["is_right"]
        if row["is_right"]:
            distinct[row["number"]].add(row["answer"])
    found = {"seconds": seconds, **summary_of(rows, options.samples), **decoder.report()}
    for k in (1, options.samples):
        each = [pass_at_k(options.samples, n, k) for n in right.values()]
        found[f"error@{k}"] = statistics.stdev(each) / len(each) ** 0.5
    kept = sum(row["tokens"] for row in rows)
    found |= {"distinct": statistics.mean(len(distinct[i]) for i in right), "drawn": 1 + decoder.extra_tokens / kept}
    return {**found, "made with": json.loads(json.dumps(decoding))}


def table_of(files: Sequence[Path], samples: int) -> list[str]:
    """In Markdown, in the order in which the rows were made."""
    own = ("moves_accepted", "large_tokens", "compute_saved", "relative_strength", "easy_questions", "hard_questions")
    lines = [
        f"| method | pass@1 | pass@{samples} | distinct right | entropy | length | drawn for one kept | s | of itself |"
    ]
    lines.append("| --- " * 9 + "|")
    for file in sorted(files, key=lambda each: json.loads(each.read_text())["number"]):
        of = json.loads(file.read_text())
        rates = [f"{of[f'pass@{k}']:.3f} ± {of[f'error@{k}']:.3f}" for k in (1, samples)]
        said = ", ".join(f"{key.replace('_', ' ')} {of[key]:.2f}" for key in own if key in of)
        numbers = [f"{of['distinct']:.2f}", f"{of['token_entropy']:.3f}", f"{of['length']:.1f}", f"{of['drawn']:.1f}"]
        lines.append("| " + " | ".join([f"`{of['name']}`", *rates, *numbers, f"{of['seconds']:.0f}", said]) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--task", choices=TASKS, default="coins")
    parser.add_argument("--model", type=Path, help="default: the shipped policy")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="rows whose name begins so")
    parser.add_argument("--draft_layers", type=int, default=0, help="0: without model_switching")
    parser.add_argument("--draft_steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("runs/decoders"))
    parser.add_argument("--table", action="store_true", help="decode nothing, only write the table")
    options = parser.parse_args(arguments)
    folder = options.out / options.task
    if not options.table:
        options.model = options.model or Path(policy_path())
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        asked, longest = problems_of(options.task, "test")
        ends = model.generation_config.eos_token_id
        base = Base(
            model=model,
            encode=lambda prompt: tokenizer(prompt)["input_ids"],
            ends=[ends] if isinstance(ends, int) else list(ends),
            pad=tokenizer.pad_token_id,
            longest=longest,
            temperature=1.0,
        )
        others, _ = problems_of(options.task, "validation")
        rows = rows_to_make(base, others, tokenizer, options)
        for number, (name, made) in enumerate(rows.items()):
            file = folder / f"{name.replace(',', '').replace(' ', '_')}.json"
            if file.is_file() or (options.only and not name.startswith(tuple(options.only))):
                continue
            write(file, {"name": name, "number": number, **measured(*made(), asked, tokenizer, options)})
            print(file, flush=True)
    lines = [
        f"{options.task}, {options.samples} samples a problem:",
        "",
        *table_of([*folder.glob("*.json")], options.samples),
    ]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
