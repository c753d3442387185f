"""What coins.yaml calls: the problems in coins.jsonl, and the testbed's exact verifier."""

import json
from pathlib import Path

import datasets

from hclm_rl.testbed.coins import is_correct

PROBLEMS = Path(__file__).parent / "coins.jsonl"


def load_problems(**settings: object) -> dict[str, datasets.Dataset]:
    rows = [json.loads(line) for line in PROBLEMS.read_text().splitlines()]
    return {"test": datasets.Dataset.from_list(rows)}


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    [completion] = results
    return {"right": float(is_correct(doc, completion))}
