"""`--on slurm`: a recipe -> batch scripts in the run folder -> jobs.

In: a resolved recipe, what to ask of the cluster. Out: RUN/slurm/*.sbatch, job numbers.
Invariant: what is submitted lies in the run folder, and `sbatch` of that file does the same again; a wrong
recipe fails here, not in the queue.
Trade-off: scripts are templates that also work by hand, so they are filled in at two marked lines only
(`#@sbatch@`, `#@arguments@`) instead of by a template language.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sftcore.config import Recipe
from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.fsio import atomic_file
from sftcore.launcher.notice import SIGNAL, notice_seconds, with_notice
from sftcore.runs.claim import open_run
from sftcore.stages.stage import Stage, wanted

TEMPLATES = Path(__file__).parent.parent / "slurm"
PLACEHOLDER = re.compile(r"^#@(\w+)@$", flags=re.M)
ENV_FILE = TEMPLATES / "env.sh"
CPUS_PER_GPU = 4  # any node has as many; sites give a task one core if it asks for none, which starves a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a job asks of the cluster.

    Args:
        nodes: machines.
        gpus_per_node: also the ranks per node; 0: none, see `ranks_per_node`.
        ranks_per_node: ranks of a run on CPUs.
        options: further options of sbatch, such as {"partition": "long", "time": "4:00:00", "exclusive": ""}.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int = 1
    options: Mapping[str, str]

    def train_options(self) -> dict[str, str]:
        """sbatch's options of the training job: one task per rank."""
        ranks = self.gpus_per_node or self.ranks_per_node
        gpus = self._gpu_options(self.gpus_per_node)
        tasks = {"ntasks": str(self.nodes * ranks), "ntasks-per-node": str(ranks)}
        return {"nodes": str(self.nodes), **tasks, **gpus, **self.options}

    def stage_options(self) -> dict[str, str]:
        """sbatch's options of a job with one process, on a GPU if the run has any."""
        gpus = self._gpu_options(min(1, self.gpus_per_node))
        return {"nodes": "1", "ntasks": "1", **gpus, **self.options}

    def run_options(self) -> dict[str, str]:
        """sbatch's options of a job whose one task starts all ranks of a machine, and does what one does."""
        ranks = self.gpus_per_node or self.ranks_per_node
        options = self.stage_options()
        if self.gpus_per_node:
            options |= {"gpus-per-node": str(ranks)}
        cpus = options.get("cpus-per-task", "" if "exclusive" in options else "1")
        if ranks > 1 and cpus.isdigit():  # what is no number is for sbatch to refuse
            options |= {"cpus-per-task": str(ranks * int(cpus))}
        return options

    def _gpu_options(self, num_gpus: int) -> dict[str, str]:
        has_all = "exclusive" in self.options  # a step takes all cores of such nodes, if none are asked for
        cpus = {} if has_all else {"cpus-per-task": str(CPUS_PER_GPU)}
        return {"gpus-per-node": str(num_gpus), **cpus} if num_gpus else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job to submit.

    Args:
        name: of its script, RUN/slurm/NAME.sbatch.
        template: file of slurm/.
        options: of sbatch.
        arguments: of the script.
        after: when it may start: after the success of the job before it, or "afterany": its end.
    """

    name: str
    template: str
    options: Mapping[str, str]
    arguments: Sequence[str]
    after: str = "afterok"

    def script(self) -> str:
        """The template, filled in."""
        values = {
            "sbatch": "\n".join(_option_line(key, value) for key, value in self.options.items()),
            "arguments": "\n".join(
                [
                    f"SFTCORE_PYTHON=${{SFTCORE_PYTHON:-{shlex.quote(sys.executable)}}}",
                    f"SFTCORE_ENV=${{SFTCORE_ENV:-{shlex.quote(str(ENV_FILE))}}}",
                    *self._notice_lines(),
                    f"set -- {shlex.join(self.arguments)}",
                ]
            ),
        }
        return fill_in((TEMPLATES / self.template).read_text(encoding="utf-8"), values)

    def _notice_lines(self) -> list[str]:
        """Tells ranks how long ahead of the end the signal comes, where that is not the template's."""
        asked = SIGNAL.fullmatch(self.options.get("signal", ""))
        return [f"SFTCORE_NOTICE=${{SFTCORE_NOTICE:-{asked[1]}}}"] if asked else []


def fill_in(template: str, values: Mapping[str, str]) -> str:
    """Replace each line `#@name@` by its value.

    Raises:
        UserInputError: a placeholder without a value, or a value without a placeholder.
    """
    names = set(PLACEHOLDER.findall(template))
    problems = [
        Problem(what=f"no value for #@{name}@ of the template") for name in sorted(names - set(values))
    ]
    problems += [Problem(what=f"the template has no line #@{name}@") for name in sorted(set(values) - names)]
    if problems:
        raise UserInputError(*problems)
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _option_line(key: str, value: str) -> str:
    """An option's line in a batch script; a value with spaces is quoted, as sbatch reads it.

    >>> _option_line("exclusive", ""), _option_line("output", "my runs/%j.log")
    ('#SBATCH --exclusive', '#SBATCH --output="my runs/%j.log"')
    """
    if not re.fullmatch(r"[\w-]+", key) or not re.fullmatch(r"[^\r\n$`#\"'\\]*", value):
        raise UserInputError(
            Problem(
                what="a batch script can't hold this option of sbatch",
                where=f"--{key}",
                got=value,
                allowed="key=value without line ends, quotes, \\, $, ` and #, or key alone",
                remedy="a run folder's name is part of --output and --job-name: --run DIR chooses another"
                if key in ("output", "job-name")
                else "",
            )
        )
    if not value:
        return f"#SBATCH --{key}"
    return f'#SBATCH --{key}="{value}"' if re.search(r"\s", value) else f"#SBATCH --{key}={value}"


def train_job(recipe: Recipe, resources: Resources, worker_arguments: Sequence[str]) -> Job:
    """The training job of a recipe whose run folder is absolute."""
    run = recipe.run_folder
    needed = notice_seconds(recipe, has_gpus=resources.gpus_per_node > 0)
    options = {
        "job-name": recipe.name,
        "output": str(run / "slurm" / "train-%j.log"),
        **with_notice(resources.train_options(), needed),
    }
    arguments = [str(run / "recipe.yaml"), "--run", str(run), *worker_arguments]
    return Job(name="train", template="train.sbatch", options=options, arguments=arguments)


def stage_job(
    folder: Path, name: str, resources: Resources, arguments: Sequence[str], *, array: str = ""
) -> Job:
    """A job, or an array of jobs, of one sftcore command.

    Args:
        folder: its script and log go into `folder`/slurm.
        array: sbatch's --array, such as "0-7%2".
    """
    log = f"{name}-%A_%a.log" if array else f"{name}-%j.log"
    options = {"job-name": f"{folder.name}-{name}", "output": str(folder / "slurm" / log)}
    options |= resources.stage_options() | ({"array": array} if array else {})
    return Job(name=name, template="stage.sbatch", options=options, arguments=arguments)


def recipe_jobs(recipe: Recipe, resources: Resources, *, num_shards: int) -> list[Job]:
    """The jobs of every stage that the recipe asks for: probe -> prepare -> train -> evaluate -> report.

    Args:
        num_shards: jobs of each array that shares a stage; a job after it merges.
    """
    run = recipe.run_folder
    of_recipe = [str(run / "recipe.yaml"), "--run", str(run)]

    def jobs_of(stage: Stage) -> list[Job]:
        if stage.by_ranks:
            return [train_job(recipe, resources, [])]
        arguments = [stage.name, *(of_recipe if stage.takes == "recipe" else [str(run)])]
        if num_shards == 1 or stage.share is None:
            return [stage_job(run, stage.name, resources, arguments)]
        return shared_stage(run, stage.name, resources, arguments, num_shards=num_shards)

    return [job for stage in wanted(recipe) if stage.has_command for job in jobs_of(stage)]


def shared_stage(
    folder: Path, name: str, resources: Resources, arguments: Sequence[str], *, num_shards: int
) -> list[Job]:
    """An array of jobs that share a command's work, and one job after it that merges."""
    shares = stage_job(folder, name, resources, arguments, array=f"0-{num_shards - 1}")
    return [shares, stage_job(folder, f"{name}-merge", resources, [*arguments, "--merge"])]


def submit_chain(folder: Path, jobs: Sequence[Job]) -> list[str]:
    """Save scripts below `folder` and submit them, each after the one before.

    Returns:
        job numbers.

    Raises:
        MissingEnvironmentError: no sbatch here.
        UserInputError: Slurm refuses a job; those submitted before it are cancelled.
    """
    if shutil.which("sbatch") is None:
        raise MissingEnvironmentError(
            Problem(what="no sbatch command here", remedy="run this on a login node of a Slurm cluster")
        )
    numbers: list[str] = []
    for job in jobs:
        path = folder / "slurm" / f"{job.name}.sbatch"
        with atomic_file(path) as handle:
            handle.write(job.script())
        dependency = (
            [f"--dependency={job.after}:{numbers[-1]}", "--kill-on-invalid-dep=yes"] if numbers else []
        )
        done = subprocess.run(
            ["sbatch", "--parsable", *dependency, str(path)], capture_output=True, text=True
        )
        if done.returncode:
            subprocess.run(["scancel", *numbers], check=False) if numbers else None
            remedy = f"see sinfo; the script is {path}"
            raise UserInputError(
                Problem(what=f"Slurm refuses the job {job.name}", got=done.stderr.strip(), remedy=remedy)
            )
        numbers.append(done.stdout.strip().split(";")[0])
    return numbers


def submit_recipe(recipe: Recipe, jobs: Sequence[Job]) -> str:
    """Claim the run folder, submit the jobs; says their numbers and how to follow them."""
    with open_run(recipe, purpose="submission") as run:
        numbers = submit_chain(run, jobs)
    return describe_jobs(run, jobs, numbers)


def describe_jobs(folder: Path, jobs: Sequence[Job], numbers: Sequence[str]) -> str:
    """A line a job, and how to follow them."""
    lines = [f"job {number}: {job.name}" for job, number in zip(jobs, numbers, strict=True)]
    logs = shlex.quote(str(folder / "slurm"))
    return "\n".join([*lines, f"follow: squeue -j {','.join(numbers)}; tail -F {logs}/*.log"])
