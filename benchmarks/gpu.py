"""One GPU: the card's limit, head, whole training steps, TRL on the same card, levers, attention, ZeRO-3.

    python -m benchmarks.gpu --out benchmarks/results            # a CUDA device; writes gpu.json
    python -m benchmarks.gpu --device cpu --tiny --out FOLDER    # the same code in a minute, to see it run

Sections run one after another, the most valuable first, within `--minutes` (under nine). Each has a share of
them in proportion to what its cases take by arithmetic; what it leaves goes to the next ones, and at the end
to cases that were passed over. What was not reached is listed as `not run`, never guessed; a measurement that
fails is recorded with its error and the others go on.
`--only step,trl` runs these anew and keeps the file's other sections, if they are of the same machine and
versions. Times are medians of synchronised runs after warm-up. `python -m benchmarks.results_page` makes the
page. Packages that are missing are named at the start, with the commands that bring them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.gpu_needs import check_packages


def main() -> None:
    """Check the packages, then measure."""
    started = time.perf_counter()
    options = parse()
    check_packages()
    from benchmarks.gpu_sections import run_sections  # imports torch, transformers and sftcore

    run_sections(options, started=started)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="shapes of a few thousand weights")
    parser.add_argument("--lengths", type=Path, help=".npy of real token counts; else a log-normal like them")
    parser.add_argument("--only", help="sections to run, by the beginnings of their names, comma-separated")
    return parser.parse_args()


if __name__ == "__main__":
    main()
