"""Train recipes one after another in this process, as each rank of a launch: [--unguarded] RECIPE..."""

import sys
from pathlib import Path

import torch

from sftcore import dist
from sftcore.log import setup_logging
from sftcore.recipe import load_recipe
from sftcore.stages import train as training

if __name__ == "__main__":
    setup_logging(rank=dist.rank())
    torch.set_num_threads(1)
    if "--unguarded" in sys.argv:
        training.check_engine = lambda *_: None
    for path in [a for a in sys.argv[1:] if not a.startswith("--")]:
        training.train_recipe(load_recipe(Path(path)))
