"""Supervised fine-tuning from a recipe: accelerate launch recipes/sft.py --config recipes/sft/curio_sft.yaml"""

import sys

from hclm_rl.commands.sft import main

if __name__ == "__main__":
    sys.exit(main())
