"""As run_cells.py, and note what each step found: [--stop] RECIPE...

RUN/watched-RANK.jsonl gets a line before every step: hashes of the model's configuration (all modules' and
all nested ones, with the attention in use), of the generation's and the adapter's, of weights and buffers.
With --stop each run is asked to stop in its third step, by a signal.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

import torch

from sftcore import dist
from sftcore.errors import StoppedOnRequest
from sftcore.fsio import append_jsonl
from sftcore.log import setup_logging
from sftcore.recipe import load_recipe
from sftcore.stages import train as training
from sftcore.train.engine import Engine

STOPPED_STEP = 3


def digest(*texts: object) -> str:
    return hashlib.sha256("\n".join(map(str, texts)).encode()).hexdigest()[:12]


def seen(engine: Engine) -> dict:
    model = engine.objective.causal_lm
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    tensors = [getattr(p, "ds_tensor", p).detach() for p in model.parameters()] + list(model.buffers())
    return {
        "attention": sorted({str(config._attn_implementation) for config in configs.values()}),
        "configuration": digest(*(sorted(vars(config).items()) for config in configs.values())),
        "generation": digest(sorted(vars(model.generation_config).items()) if model.can_generate() else ""),
        "adapter": digest(getattr(model, "peft_config", {})),
        "training": sorted({module.training for module in model.modules()}),
        "weights": digest(*(t.flatten().view(torch.uint8).numpy().tobytes().hex() for t in tensors)),
    }


if __name__ == "__main__":
    setup_logging(rank=dist.rank())
    torch.set_num_threads(1)
    plain_step = Engine.step
    for path in [a for a in sys.argv[1:] if not a.startswith("--")]:
        recipe = load_recipe(Path(path))
        count = []

        def watched_step(engine, *args, recipe=recipe, count=count, **options):
            engine.deepspeed.train()
            append_jsonl(recipe.run_folder / f"watched-{dist.rank()}.jsonl", seen(engine))
            count.append(1)
            if "--stop" in sys.argv and len(count) == STOPPED_STEP:
                os.kill(os.getpid(), signal.SIGUSR1)
            return plain_step(engine, *args, **options)

        Engine.step = watched_step
        try:
            training.train_recipe(recipe)
            assert "--stop" not in sys.argv
        except StoppedOnRequest:
            pass
