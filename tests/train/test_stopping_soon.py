"""A stop is seen between packs; what is given up has changed nothing: resumed runs equal whole ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, run_cells, start_ranks, steps, wait_for_all, weights_hash, write_recipe

from sftcore.fsio import read_jsonl
from sftcore.train.stopping import LOOK_SECONDS, StopNotice, packs_between_looks

WORKER = str(ROOT / "launcher" / "worker.py")
STAGES = ((0, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "float32"))
# a rank that is sent a stop when it has computed so many packs of training (or batches of validation)
STOPPED = """
import os, signal, sys
from pathlib import Path
from sftcore.stages import train as training
from sftcore import dist
from sftcore.log import setup_logging
from sftcore.recipe import load_recipe
from sftcore.objectives.next_token import NextToken
from sftcore.train import stopping
from sftcore.errors import StoppedOnRequest
stopping.LOOK_SECONDS = 0  # a look before each pack
kind, count, who, *paths = sys.argv[1:]
done = []
forward = NextToken.forward
def counted(self, batch):
    done.extend([1] if self.training == (kind == "train") else [])
    if len(done) == int(count) and dist.rank() == int(who):
        os.kill(os.getpid(), signal.SIGUSR1)
    return forward(self, batch)
NextToken.forward = counted
setup_logging(rank=dist.rank())
for path in paths:
    done.clear()
    try:
        training.train_recipe(load_recipe(Path(path)), is_launched=True)
        print("FINISHED", path)
    except StoppedOnRequest as error:
        print("STOPPED", error)
"""


def stop_in(kind: str, count: int, paths: list[Path], *, ranks: int) -> list[str]:
    Path("stopped.py").write_text(STOPPED)
    started = start_ranks(ranks, "stopped.py", kind, str(count), str(ranks - 1), *map(str, paths))
    assert wait_for_all(started) == [0] * ranks, [rank.output()[1][-3000:] for rank in started]
    said = [line for rank in started for line in rank.output()[0].splitlines() if line.startswith("STOPPED")]
    assert len(said) == ranks * len(paths), [rank.output() for rank in started]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_is_given_up_has_changed_nothing(tiny_recipe, ranks):
    """Eight packs a step, one sample each; the stop comes in the middle of the third of eight steps."""
    changes = {"batch": {"samples_per_step": 8, "capacity": 60}}
    changes |= {"checkpoint": {"save_every_steps": 100}, "train": {"epochs": 4, "lr": 1e-2}}
    cells = {f"s{s}-{d}": {"deepspeed": f"zero{s}", "model": {"dtype": d}} for s, d in STAGES}
    whole = [write_recipe(tiny_recipe, f"{name}-whole", **changes, **cell) for name, cell in cells.items()]
    cut = [write_recipe(tiny_recipe, name, **changes, **cell) for name, cell in cells.items()]
    run_cells(whole, ranks=ranks)
    packs = math.ceil(steps(whole[0].stem)[0]["num_packs"] / ranks)
    assert packs >= 3, packs
    told = stop_in("train", 1 + 2 * packs + 2, cut, ranks=ranks)  # a rehearsal, two steps, two packs
    assert all("after step 2;" in line for line in told), told
    for path in cut:
        assert [f.name for f in Path("runs", path.stem, "checkpoints").iterdir()] == ["step-000002"]
        assert len(steps(path.stem)) == 2
    assert run_cells(cut, ranks=ranks).count("resuming after step 2") == len(cut)
    for path in cut:
        assert weights_hash(path.stem) == weights_hash(f"{path.stem}-whole"), path.stem
        same = [{key: row[key] for key in ("step", "loss", "grad_norm")} for row in steps(path.stem)]
        assert same == [{key: row[key] for key in same[0]} for row in steps(f"{path.stem}-whole")]


def test_a_stop_before_the_first_step_is_done_leaves_no_checkpoint_and_in_the_last_pack_a_step(tiny_recipe):
    changes = {"batch": {"samples_per_step": 8, "capacity": 60}, "checkpoint": {"save_every_steps": 100}}
    early, late = (write_recipe(tiny_recipe, name, **changes) for name in ("early", "late"))
    assert "before the first step was done" in stop_in("train", 2, [early], ranks=1)[0]
    assert (
        not list(Path("runs/early").glob("checkpoints/*")) and not Path("runs/early/metrics.jsonl").exists()
    )
    run_cells([early], ranks=1)
    packs = steps("early")[0]["num_packs"]
    assert "after step 1;" in stop_in("train", 1 + packs, [late], ranks=1)[0]
    assert [f.name for f in Path("runs/late/checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_that_is_given_up_is_made_at_the_next_start(tiny_recipe, ranks):
    valid = [{"format": "facts", "path": "test.jsonl"}]
    recipe = {**tiny_recipe, "data": {**tiny_recipe["data"], "valid": valid, "test": []}}
    changes = {"train": {"evaluate_every_steps": 2, "keep": "best", "lr": 1e-3}, "batch": {"capacity": 60}}
    changes["checkpoint"] = {"save_every_steps": 100}
    whole, cut = (write_recipe(recipe, name, **changes) for name in ("whole", "cut"))
    run_cells([whole], ranks=ranks)
    assert "after step 2;" in stop_in("valid", 1, [cut], ranks=ranks)[0]
    assert not Path("runs/cut/valid.jsonl").exists()
    assert "resuming after step 2" in run_cells([cut], ranks=ranks)
    rows = [read_jsonl(Path("runs", name, "valid.jsonl")) for name in ("whole", "cut")]
    assert [row["step"] for row in rows[1]] == [2, 4, 6, 8]
    assert [row["valid_loss"] for row in rows[0]] == [row["valid_loss"] for row in rows[1]]
    assert weights_hash("cut") == weights_hash("whole")


def test_looks_are_as_rare_as_packs_are_quick():
    assert packs_between_looks(8 * LOOK_SECONDS, 16) == 2
    assert packs_between_looks(0.1, 1) == 100, "a quick step is never given up"


def test_a_notice_that_is_too_short_is_warned_of_once_by_name(caplog, monkeypatch):
    monkeypatch.setenv("SFTCORE_NOTICE", "180")
    notice = StopNotice.of_environment()
    notice.see_step(900.0, num_packs=10)  # packs of 90 s
    notice.see_save(80.0)
    assert not caplog.records
    for _ in range(2):
        notice.see_save(100.0)
    (record,) = caplog.records
    said = record.getMessage()
    assert "up to 190 s here (90 s of a step, 100 s to save)" in said and "signal=B:USR1@285" in said
    monkeypatch.delenv("SFTCORE_NOTICE")
    unasked = StopNotice.of_environment()
    unasked.see_step(1e6, num_packs=1)
    assert len(caplog.records) == 1, "nobody gives notice here"


NAN = """
import json, math, sys
from pathlib import Path
from sftcore.stages import train as training
from sftcore.recipe import load_recipe
from sftcore.train.engine import Engine
from sftcore.log import setup_logging
setup_logging(rank=0)
losses = json.loads(sys.argv[1])
evaluate = Engine.evaluate
def wrong(self, batches, **options):
    loss = evaluate(self, batches, **options)
    value = losses.pop(0)
    return loss if value is None else float(value)
Engine.evaluate = wrong
training.train_recipe(load_recipe(Path(sys.argv[2])))
"""


def with_valid_losses(recipe: dict, name: str, losses: list, **train) -> list[dict]:
    """The rows of valid.jsonl of a run whose valid losses are these."""
    valid = [{"format": "facts", "path": "test.jsonl"}]
    recipe = {**recipe, "data": {**recipe["data"], "valid": valid, "test": []}}
    path = write_recipe(recipe, name, train={"evaluate_every_steps": 1, "keep": "best", **train})
    Path("nan.py").write_text(NAN)
    command = [sys.executable, "nan.py", json.dumps(losses), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("none is the lowest" in done.stderr) == (not any(math.isfinite(float(loss)) for loss in losses))
    return read_jsonl(Path("runs", name, "valid.jsonl"))


def test_a_valid_loss_that_is_not_finite_is_no_lowest_and_ends_no_patience(tiny_recipe):
    losses = ["nan", 5.0, 4.0, "inf", 3.0, 3.5, 3.6, 9.0]
    rows = with_valid_losses(tiny_recipe, "odd", losses, patience=2)
    assert [row["valid_loss"] for row in rows] == [None, 5.0, 4.0, None, 3.0, 3.5, 3.6]
    assert Path("runs/odd/model/config.json").is_file() and not Path("runs/odd/best").exists()
    never = with_valid_losses(tiny_recipe, "never", ["nan"] * 8, patience=3)
    assert len(never) == 4, "no loss in three evaluations behind the first"
    assert Path("runs/never/model/config.json").is_file(), "the last weights"


@pytest.mark.slow
def test_of_two_ranks_of_which_one_hangs_the_run_ends_as_hung(tiny_recipe):
    """One ends with 1 and leaves it; before, none did, and the job was queued again as if one was lost."""
    from sftcore.launcher.ranks import agreed_code, read_codes

    path = write_recipe(tiny_recipe, "hung", train={"epochs": 50, "hang_seconds": 12})
    script = (
        "import runpy, sys, time\n"
        "from sftcore import dist\n"
        "from sftcore.train import batches, loop\n"
        "made = loop.rank_batches\n"
        "def hanging(source, step):\n"
        "    if step.number == 5 and dist.rank() == 1:\n"
        "        time.sleep(600)\n"
        "    return made(source, step)\n"
        "loop.rank_batches = hanging\n"
        f"sys.argv[0] = {WORKER!r}\n"
        f"runpy.run_path({WORKER!r}, run_name='__main__')\n"
    )
    Path("hang.py").write_text(script)
    ranks = start_ranks(2, "hang.py", str(path), "--rank-logs")
    codes = wait_for_all(ranks, seconds=120)
    assert 1 in codes and set(codes) <= {1, 69}, [rank.output()[1][-2000:] for rank in ranks]
    left = read_codes(Path("runs/hung"))
    assert left == dict(enumerate(codes)) and agreed_code(left, 2) == 1
    assert (
        "no step has ended for 12 s" in Path("runs/hung/logs/rank-1.log").read_text() + ranks[0].output()[1]
    )


def test_however_a_rank_ends_itself_it_leaves_its_code(tmp_path):
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from sftcore.launcher.ranks import write_code\n"
        "from sftcore.train import watchdog\n"
        "from sftcore.train.stopping import StopRequest, WITH_INTERRUPT, end_on_stop, leave_codes_with\n"
        "import signal\n"
        "leave_codes_with(lambda code: write_code(Path('run'), 0, code))\n"
        "how = sys.argv[1]\n"
        "if how == 'stop':\n"
        "    end_on_stop('stopped')\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "elif how == 'interrupt':\n"
        "    with StopRequest(WITH_INTERRUPT):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "else:\n"
        "    watchdog.BEAT_SECONDS = 0.05\n"
        "    with watchdog.Watchdog(0.1) as dog:\n"
        "        dog.step_done(0.1)\n"
        "        time.sleep(30)\n"
    )
    for how, code in {"stop": 75, "interrupt": 130, "hang": 1}.items():
        done = subprocess.run(
            [sys.executable, "-c", script, how], cwd=tmp_path, capture_output=True, timeout=60
        )
        assert done.returncode == code
        assert (tmp_path / "run/logs/rank-0.exit").read_text() == f"{code}\n"
