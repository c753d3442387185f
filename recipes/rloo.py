"""RLOO from a recipe: accelerate launch recipes/rloo.py --config recipes/quickstart.yaml"""

import sys

from hclm_rl.commands.launch import main

if __name__ == "__main__":
    sys.exit(main("rloo"))
