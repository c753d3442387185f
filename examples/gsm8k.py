"""GSM8K's training and test problems as the two files that the recipes and `hclm-rl eval` read; needs the network once.

python examples/gsm8k.py    # writes gsm8k_train.jsonl and gsm8k_test.jsonl into this folder
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets

# the reward reads the last box, or the number at the end of the text
ASK = "Reason step by step, and put the final answer within \\boxed{}."


def as_problems(rows: Iterable[dict] | datasets.Dataset) -> Iterator[dict]:
    """{prompt: messages, answer: the number} of each; GSM8K's answers end in `#### 72`, with commas in thousands."""
    for row in map(dict, rows):
        prompt = [{"role": "user", "content": f"{row['question'].strip()}\n{ASK}"}]
        yield {"prompt": prompt, "answer": row["answer"].rpartition("####")[2].strip().replace(",", "")}


def main() -> None:
    """7,473 problems to train on, 1,319 to judge by."""
    for split in ("train", "test"):
        problems = as_problems(datasets.load_dataset("openai/gsm8k", "main", split=split))
        lines = [json.dumps(problem, ensure_ascii=False) for problem in problems]
        Path(f"gsm8k_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
