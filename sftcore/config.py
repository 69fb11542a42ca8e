"""The recipe: every setting of a run, its default and its meaning.

In: plain values. Out: a frozen `Recipe`; its field descriptions are the JSON schema of `sftcore schema`.
Invariant: a `Recipe` that exists is complete and consistent in itself (recipe.py reads files and checks
paths).
Trade-off: unknown keys are refused rather than kept for plug-ins, since a silently ignored `learning_rat`
costs a run.
Parsing needs no torch (import in about 0.2 s), so `sftcore --help` and `sftcore plan` start at once.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from sftcore.settings import ADAPTER_LR as ADAPTER_LR
from sftcore.settings import FULL_LR as FULL_LR
from sftcore.settings import (
    LOWEST_TEMPERATURE,
    MAX_COUNT,
    Completion,
    FolderName,
    Fraction,
    MatchingSettings,
    Natural,
    PathText,
    Positive,
    Settings,
    TrackingSettings,
)
from sftcore.settings import AdapterSettings as AdapterSettings
from sftcore.settings import TrainSettings as TrainSettings
from sftcore.sources import InlineTemplate as InlineTemplate
from sftcore.sources import Source as Source
from sftcore.tasks import TASKS
from sftcore.tasks.task import Architecture
from sftcore.tasks.template import DEFAULT_TEMPLATE

DRAW_STRIDE = 1_000_003  # between the seeds of two draws


def _known_task(name: str) -> str:
    """Refuse a task that there is no module for."""
    if name not in TASKS:
        raise ValueError(f"a task is one of {', '.join(TASKS)}")
    return name


class ModelSettings(Settings):
    """Which model, and how it is held."""

    path: PathText = Field(
        description="folder (absolute, else relative to the recipe, then to here) or a hub name"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="dtype of the trained weights; auto: bfloat16 on GPUs and on CPUs with instructions for"
        " it, else float32; a run keeps what it began with",
    )
    head: Literal["auto", "liger", "chunked"] = Field(
        "auto",
        description="loss over the vocabulary; auto: ours in blocks (liger's is not yet measured next to it)",
    )
    attention: Literal["auto", "flash_attn", "torch_varlen", "flex", "sdpa_docs"] = Field(
        "auto", description="attention backend for training; auto: the first that can"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    chat_template: str | None = Field(
        None, description="name of one of the tokenizer's chat templates, or a Jinja file; null: its default"
    )
    add_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="special tokens to add; their rows begin as the mean row and are trained"
    )


class DataSettings(Settings):
    """What is read, and how it becomes samples."""

    train: list[Source] = Field(min_length=1, description="training sources")
    valid: list[Source] = Field([], description="held-out sources whose loss is taken during training")
    test: list[Source] = Field([], description="held-out sources, in domain")
    ood: list[Source] = Field([], description="held-out sources, out of domain; reported apart")
    template: str | InlineTemplate = Field(DEFAULT_TEMPLATE, description="name in sftcore/assets, or inline")
    max_length: Positive | None = Field(None, description="tokens; defaults to batch.capacity")
    overlength: Literal["reject", "trim_prompt", "error"] = Field(
        "reject", description="what to do with a sample over max_length; an answer is never cut"
    )
    max_reject_fraction: Fraction = Field(0.01, description="more rejected rows than this share is an error")
    deduplicate: bool = Field(False, description="drop exact duplicates of prompt and answer")
    trivial_facts: Literal["drop", "keep"] = Field(
        "drop",
        description="facts with a one-letter answer, or an answer inside the subject: drop leaves them out of"
        " probe, selection and evaluation",
    )
    relations: PathText | None = Field(
        None, description="file of relations of your own (JSON, as sftcore/assets/relations.json)"
    )
    system: Literal["keep", "merge", "drop"] = Field(
        "keep",
        description="system and developer turns of chats; merge: into the next user turn, for templates that"
        " know no such role",
    )
    train_answers: Literal["all", "last"] = Field(
        "all",
        description="assistant turns of chats; last: of each chat only the last that it trains, for templates"
        " that write earlier ones otherwise",
    )
    today: date | None = Field(
        None, description="the day that a chat template writes, as 2026-01-31; null: one that asks is refused"
    )
    temperature: Annotated[float, Field(ge=1, le=MAX_COUNT)] | None = Field(
        None,
        description="a source of n samples gets the share n^(1/T) of each epoch: 1 keeps the sizes' ratios,"
        " more evens them out; instead of weights",
    )

    @model_validator(mode="after")
    def _one_mixture(self) -> DataSettings:
        weighted = [source.weight is not None for source in self.train]
        if any(weighted) and not all(weighted):
            raise ValueError("give `weight` to all training sources, or to none")
        if any(weighted) and self.temperature is not None:
            raise ValueError("give `weight` to the sources or `temperature`, not both")
        if any(source.weight is not None for source in (*self.valid, *self.test, *self.ood)):
            raise ValueError("`weight` is for training sources: held-out ones are always read whole")
        return self


class ProbeSettings(Settings):
    """How memory is measured (arXiv 2409.15825: 21 templates x 10 samples, temperature 0.7, 32 tokens)."""

    templates: Positive = Field(21, description="completion templates per relation")
    samples: Positive = Field(10, description="sampled completions per template")
    temperature: Annotated[float, Field(ge=LOWEST_TEMPERATURE, le=MAX_COUNT)] = Field(
        0.7, description="sampling temperature; no top-k, no top-p"
    )
    max_new_tokens: Completion = Field(32, description="tokens per completion")
    estimator: Literal["sampling", "likelihood"] = Field(
        "sampling",
        description="likelihood: how probable the answer is as the completion's beginning; for short answers",
    )
    backend: Literal["auto", "hf", "vllm"] = Field(
        "auto", description="what samples: transformers (hf, and auto), or vLLM where it is installed"
    )
    batch_rows: Positive = Field(640, description="completions drawn together")

    @model_validator(mode="after")
    def _vllm_samples(self) -> ProbeSettings:
        if self.backend == "vllm" and self.estimator != "sampling":
            raise ValueError("backend: vllm samples: set estimator: sampling, or backend: hf")
        return self


class SelectSettings(Settings):
    """Which facts are trained on."""

    levels: list[Annotated[int, Field(ge=0, le=4)]] = Field([2], min_length=1, description="memory levels")
    n: Positive | Literal["all"] = Field(
        60,
        description="number of facts or pairs; all: of these levels, or as many of each label or level",
    )
    balance: Literal["relation", "level", "label", "none"] = Field(
        "relation",
        description="equal shares per relation, per level and its relations, or (pairs) per label; none: any",
    )
    draw: Natural = Field(
        0, description="number of the random draw; also another order of training and new weights"
    )
    answers: Literal["own", "permuted"] = Field(
        "own",
        description="permuted: a control; each fact is trained with another one's answers, of its relation",
    )


class BatchSettings(Settings):
    """How samples become steps; exactly one of samples_per_step and tokens_per_step."""

    samples_per_step: Positive | None = Field(None, description="samples per optimizer step")
    tokens_per_step: Positive | None = Field(
        None, description="tokens per optimizer step, a multiple of capacity"
    )
    capacity: Positive = Field(4096, description="tokens in a pack at most")

    @model_validator(mode="after")
    def _one_mode(self) -> BatchSettings:
        if (self.samples_per_step is None) == (self.tokens_per_step is None):
            raise ValueError("give exactly one of samples_per_step and tokens_per_step")
        if self.tokens_per_step is not None and self.tokens_per_step % self.capacity:
            raise ValueError(
                f"tokens_per_step ({self.tokens_per_step}) must be a multiple of capacity ({self.capacity})"
            )
        return self


class ObjectiveSettings(Settings):
    """What the model is trained for."""

    name: FolderName = Field(
        "auto",
        description="next_token, classify or encode, or one that was added (docs/extending.md); auto: what"
        " task and matching.mode need",
    )


class CheckpointSettings(Settings):
    """How often the state is saved, and how many are kept."""

    save_every_steps: Positive = Field(50, description="optimizer steps between checkpoints")
    keep: Positive = Field(2, description="newest committed checkpoints kept")


class EvaluateSettings(Settings):
    """Greedy decoding of the held-out items."""

    max_new_tokens: Completion = Field(16, description="tokens per answer")
    batch_size: Positive = Field(32, description="sequences decoded together")
    few_shot: Annotated[int, Field(ge=0, le=1000)] = Field(
        0, description="also the base model after this many solved training examples (RUN/eval/fewshot)"
    )
    drift: bool = Field(
        False,
        description="also KL(tuned || base) of first tokens on facts known best (RUN/eval/drift.json)",
    )


class Recipe(Settings):
    """A whole run."""

    name: FolderName = Field("run", description="the run's name; its folder is runs/NAME")
    run: PathText | None = Field(None, description="run folder, if not runs/NAME")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        17, description="of shuffles, packs, draws and sampling"
    )
    model: ModelSettings
    adapter: AdapterSettings = Field(default_factory=lambda: AdapterSettings())
    task: Annotated[str, AfterValidator(_known_task)] = Field(
        "qa",
        json_schema_extra={"enum": list(TASKS)},
        description="qa: facts in a template, scored by containment, and prompts with completions; matching:"
        " pairs of texts -> same or different; chat: messages through the model's chat template, all"
        " assistant turns trained, scored by the exact last reply",
    )
    data: DataSettings
    probe: ProbeSettings = Field(default_factory=lambda: ProbeSettings())
    select: SelectSettings | None = Field(
        None, description="draw training facts by memory level; null: train on all"
    )
    batch: BatchSettings
    objective: ObjectiveSettings = Field(default_factory=lambda: ObjectiveSettings())
    train: TrainSettings = Field(default_factory=lambda: TrainSettings())
    deepspeed: PathText = Field("zero1", description="a name from ds_configs/ or a path")
    checkpoint: CheckpointSettings = Field(default_factory=lambda: CheckpointSettings())
    evaluate: EvaluateSettings = Field(default_factory=lambda: EvaluateSettings())
    matching: MatchingSettings = Field(default_factory=lambda: MatchingSettings())
    tracking: TrackingSettings = Field(default_factory=lambda: TrackingSettings())

    @property
    def training_seed(self) -> int:
        """Seed of training's order, dropout and new weights: another for each draw of the same recipe."""
        return (self.seed + DRAW_STRIDE * (self.select.draw if self.select else 0)) % 2**31

    @model_validator(mode="after")
    def _rate_is_decided(self) -> Recipe:
        """`train.lr: auto` becomes a number; `says_lr` tells that it was auto."""
        if self.train.lr == "auto":
            decided = self.train.model_copy(
                update={"lr": FULL_LR if self.adapter.kind == "none" else ADAPTER_LR}
            )
            decided.model_fields_set.discard("lr")
            object.__setattr__(self, "train", decided)  # frozen for everyone else
        return self

    @property
    def says_lr(self) -> bool:
        """Whether `train.lr` is a number that the user gave."""
        return "lr" in self.train.model_fields_set

    @model_validator(mode="after")
    def _lengths_fit(self) -> Recipe:
        if self.data.max_length is not None and self.data.max_length > self.batch.capacity:
            raise ValueError(
                f"data.max_length ({self.data.max_length}) is over batch.capacity ({self.batch.capacity})"
            )
        return self

    @model_validator(mode="after")
    def _valid_is_there(self) -> Recipe:
        train = self.train
        asked = [
            name
            for name, is_set in {
                "evaluate_every_steps": train.evaluate_every_steps is not None,
                "patience": train.patience is not None,
                "keep: best": train.keep == "best",
            }.items()
            if is_set
        ]
        if asked and not self.data.valid:
            raise ValueError(f"train.{asked[0]} needs held-out samples: give data.valid")
        return self

    @model_validator(mode="after")
    def _adapter_is_there(self) -> Recipe:
        if self.train.init_adapter is not None and self.adapter.kind == "none":
            raise ValueError("train.init_adapter needs adapter.kind: lora or qlora")
        return self

    @model_validator(mode="after")
    def _honoured(self) -> Recipe:
        task = TASKS[self.task]
        for fault in task.faults(self):
            raise ValueError(fault)
        if self.adapter.kind != "none" and not self.matching.has_plain_classifier:
            raise ValueError("matching.pooling: mean and layers: 2 train all weights: set adapter.kind: none")
        if self.select and self.select.balance not in task.balances:
            raise ValueError(f"select.balance of task {self.task} is {' or '.join(task.balances)}")
        if self.select and self.select.answers == "permuted" and not task.has_facts:
            raise ValueError("select.answers: permuted is for facts: set own")
        return self

    @property
    def architecture(self) -> Architecture:
        """What is trained: a causal LM, one with a classifier, or an encoder with one."""
        return TASKS[self.task].architecture(self.matching)

    @property
    def classifies(self) -> bool:
        """Whether samples have a class instead of trained tokens."""
        return self.architecture != "decoder"

    @property
    def selects_by_level(self) -> bool:
        """Whether memory levels have to be known before training."""
        return self.select is not None and TASKS[self.task].selects_by == "levels"

    @property
    def max_length(self) -> int:
        """Tokens in a sample at most."""
        return self.data.max_length or self.batch.capacity

    @property
    def result_folder(self) -> Path:
        """Where the trained weights go: RUN/model, or RUN/adapter."""
        return self.run_folder / ("model" if self.adapter.kind == "none" else "adapter")

    @property
    def run_folder(self) -> Path:
        """Where this run's files go."""
        return Path(self.run) if self.run else Path("runs") / self.name
