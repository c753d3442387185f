"""GRPO from a recipe: accelerate launch recipes/grpo.py --config recipes/quickstart.yaml"""

import sys

from hclm_rl.commands.launch import main

if __name__ == "__main__":
    sys.exit(main("grpo"))
