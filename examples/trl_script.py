"""A script of TRL's GRPO, changed by two lines: the import, and the entry `entropy_terms`. Runs on a CPU.

python examples/trl_script.py
hclm-rl report runs/trl_script
"""

import sys

from hclm_rl import GRPOConfig, GRPOTrainer  # changed: it was `from trl import GRPOConfig, GRPOTrainer`
from hclm_rl.testbed.coins import correct_payment, make_dataset
from hclm_rl.testbed.policy import policy_path


def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]:
    """1 where the coins are paid exactly; `columns` are those of the data."""
    return [*correct_payment(prompts, completions, **columns)]


def main(max_steps: int = 50, output_dir: str = "runs/trl_script") -> GRPOTrainer:
    """Trains the testbed's small policy for `max_steps` optimiser steps; what it writes lies in `output_dir`."""
    args = GRPOConfig(
        output_dir=output_dir,
        entropy_terms=["hold_coverage"],  # added: what docs/choose.md names first
        max_steps=max_steps,
        num_generations=16,
        per_device_train_batch_size=128,  # responses: 8 prompts
        steps_per_generation=2,
        max_completion_length=17,  # tokens; no right answer is longer
        learning_rate=4e-4,  # as in recipes/quickstart.yaml; the policy has 110,000 parameters
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=policy_path(),  # your model's name
        reward_funcs=reward,  # your reward
        args=args,
        train_dataset=make_dataset("train", problems=256, seed=0),  # your data, with a column `prompt`
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
