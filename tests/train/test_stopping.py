"""Stopping well: a signal to one rank, a number that is not finite, a full disk; nothing is lost."""

from __future__ import annotations

import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from launching import ROOT, run_cells, start_ranks, steps, wait_for_all, weights_hash, write_recipe

STAGES = ((0, "float32"), (1, "bfloat16"), (2, "float32"), (2, "bfloat16"), (3, "bfloat16"))
LONG = {"train": {"epochs": 10}, "checkpoint": {"save_every_steps": 1000}}


@pytest.mark.slow
def test_a_signal_to_one_worker_stops_all_ranks_behind_a_checkpoint(tiny_recipe):
    """Only rank 1 is told; both exit with 75 after the same step, and what follows equals a whole run."""
    whole, cut = (write_recipe(tiny_recipe, name, **LONG) for name in ("whole", "cut"))
    run_cells([whole], ranks=2)
    ranks = start_ranks(2, str(ROOT / "launcher" / "worker.py"), str(cut))
    metrics = Path("runs/cut/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert all(r.poll() is None for r in ranks) and time.monotonic() < deadline
        time.sleep(0.002)
    ranks[1].send_signal(signal.SIGUSR1)
    said = [r.communicate(timeout=120)[1] for r in ranks]
    assert [r.returncode for r in ranks] == [75, 75], said
    done = len(steps("cut"))
    assert 3 <= done < 40 and all(f"after step {done}" in text for text in said)
    assert [f.name for f in Path("runs/cut/checkpoints").iterdir()] == [f"step-{done:06d}"]
    resumed = run_cells([cut], ranks=2)
    assert f"resuming after step {done}" in resumed
    assert weights_hash("cut") == weights_hash("whole")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_step_pack_and_samples(tiny_recipe):
    script = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from sftcore.errors import TrainingFailed\n"
        "from sftcore.objectives.next_token import NextToken\n"
        "from sftcore.stages import train as training\n"
        "from sftcore.recipe import load_recipe\n"
        "from sftcore.log import setup_logging\n"
        "from sftcore import dist\n"
        "kind, *paths = [a for a in sys.argv[1:] if not a.startswith('--')]\n"
        "forward, count = NextToken.forward, []\n"
        "def broken(self, batch):\n"
        "    loss, metrics = forward(self, batch)\n"
        "    count.append(1)\n"
        "    if len(count) < 5:  # a rehearsal, then a pack a step\n"
        "        return loss, metrics\n"
        "    if kind == 'loss':\n"
        "        is_last = dist.rank() == dist.world_size() - 1\n"
        "        return loss * (float('nan') if is_last else 1), metrics\n"
        "    loss.register_hook(lambda g: g * float('inf'))\n"
        "    return loss, metrics\n"
        "NextToken.forward = broken\n"
        "for path in paths:\n"
        "    count.clear()\n"
        "    try:\n"
        "        training.train_recipe(load_recipe(Path(path)))\n"
        "    except TrainingFailed as error:\n"
        "        line = f'FAILED {dist.rank()} ' + str(error).replace(chr(10), ' ')\n"
        "        os.write(1, (line + chr(10)).encode())  # in one piece: both ranks write here\n"
    )
    Path("broken.py").write_text(script)
    changes = {"batch": {"samples_per_step": 4, "capacity": 4096}, "checkpoint": {"save_every_steps": 1}}
    paths = [
        str(write_recipe(tiny_recipe, f"s{s}-{d}", deepspeed=f"zero{s}", model={"dtype": d}, **changes))
        for s, d in STAGES
    ]
    for kind, expected in (("loss", "the loss is nan"), ("gradient", "the gradient norm is not finite")):
        ranks = start_ranks(2, "broken.py", kind, *paths)
        assert wait_for_all(ranks) == [0, 0]
        said = "".join(text for rank in ranks for text in rank.output())
        lines = re.findall(r"FAILED \d.*?checkpoint is good", said)
        assert len(lines) == 2 * len(paths), said[-3000:]
        for line in lines:
            assert f"{expected}" in line and "in step 4; the weights were not updated" in line, line
            assert ("packs 0, 1 of 2" if kind == "gradient" else " of 2, samples f") in line, line
            assert line.count(" f") >= (4 if kind == "gradient" else 2)
        for path in paths:
            folders = sorted(f.name for f in (Path("runs") / Path(path).stem / "checkpoints").iterdir())
            assert folders == ["step-000002", "step-000003"]
            shutil.rmtree(Path("runs") / Path(path).stem)
