"""Train one recipe after another in this process (each rank of a launch runs this): RECIPE..."""

import sys
from pathlib import Path

import torch

from launcher.worker import train_recipe
from sftcore import dist
from sftcore.log import setup_logging
from sftcore.recipe import load_recipe

if __name__ == "__main__":
    setup_logging(rank=dist.rank())
    torch.set_num_threads(1)
    for path in [a for a in sys.argv[1:] if not a.startswith("--local_rank")]:
        train_recipe(load_recipe(Path(path)))
