"""What all sections of a recipe are made of, and the sections on text matching and on training.

In: plain values. Out: frozen settings; see config.py, which puts them together.
Invariant: combinations that a path can't honour are refused here by name, before any data is read.
Trade-off: a file of their own for some sections keeps config.py under 400 lines; whoever looks for a key of
`matching` or `train` looks in two places.
"""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_serializer, model_validator

from sftcore.display import masked
from sftcore.wrong_values import NAME_PATTERN

FULL_LR = 1e-5  # of the memory-level papers (arXiv 2409.15825): all weights of 7B models
ADAPTER_LR = 2e-4  # arXiv 2305.14314, table 9: LoRA on models of up to 13B
MAX_COUNT = 10**9  # of anything: int64 holds its square, float32 its value, and no run has more
MAX_NEW_TOKENS = 10**6  # of a completion: no model has more positions
LOWEST_TEMPERATURE = 1e-6  # below, float32's logits are no numbers any more
MAX_PATH_BYTES, MAX_NAME_BYTES = 4096, 200  # PATH_MAX of Linux; NAME_MAX is 255, less what we add


def _path_text(text: str) -> str:
    """Refuse what can't be a path anywhere."""
    if "\0" in text:
        raise ValueError("a path holds no NUL character")
    if len(text.encode("utf-8", "surrogateescape")) > MAX_PATH_BYTES:
        raise ValueError(f"a path of {len(text):,} letters: {MAX_PATH_BYTES} bytes are possible")
    return text


def _name_text(text: str) -> str:
    """Refuse what can't be the name of a folder, with what is put around it."""
    if len(text.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"a name of {len(text):,} letters: at most {MAX_NAME_BYTES} bytes")
    return text


def _web_address(text: str) -> str:
    """Refuse what is no address of a server."""
    try:
        parts = urlsplit(text)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        is_address = False
    if not is_address or not text.isprintable() or " " in text:
        raise ValueError("not an address of a server, such as http://127.0.0.1:8000/v1")
    return text


PathText = Annotated[str, AfterValidator(_path_text)]
FolderName = Annotated[str, Field(pattern=NAME_PATTERN), AfterValidator(_name_text)]
NonNegative = Annotated[float, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Completion = Annotated[int, Field(gt=0, le=MAX_NEW_TOKENS)]
Natural = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Seconds = Annotated[float, Field(gt=0, le=MAX_COUNT)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of an average, per step
NUM_CLASSES = 2  # of a pair: different, same
MATCHING_FILE = "matching.json"  # next to the weights: which prompts and label words they were trained with
CHECKSUMS = "weights.sha256"  # in the folder of a result: of the files that decide its numbers
BARE_LABELS = ("0", "1")  # what files write for them, whatever the label words are


class Settings(BaseModel):
    """Base of all sections: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LabelWords(Settings):
    """The label's text per language: [text of label 0, text of label 1]."""

    zh: tuple[str, str] = Field(("不同", "相同"), description="of Chinese pairs: [label 0, label 1]")
    en: tuple[str, str] = Field(("different", "same"), description="of other pairs: [label 0, label 1]")

    @model_validator(mode="after")
    def _readable(self) -> LabelWords:
        """Each word is one number's, in files of either language and next to the bare 0 and 1."""
        owners = {bare: (number, "a file's own") for number, bare in enumerate(BARE_LABELS)}
        faults = []
        for language, words in (("zh", self.zh), ("en", self.en)):
            for number, word in enumerate(words):
                owner, whose = owners.setdefault(word.casefold(), (number, language))
                if not word or word != word.strip() or len(word.splitlines()) > 1:
                    faults.append(f"{language} {word!r}: a word of one line, without spaces around it")
                elif owner != number:
                    faults.append(f"{language} {word!r} can't mean {number}: {whose} {word!r} means {owner}")
        if faults:
            raise ValueError(f"label words look alike or read: {'; '.join(faults)}")
        return self


class PairExample(Settings):
    """A pair with its label, shown in the prompt."""

    a: str = Field(min_length=1, description="first text")
    b: str = Field(min_length=1, description="second text")
    label: Literal[0, 1] = Field(description="0: they differ in meaning; 1: they mean the same")
    rationale: str | None = Field(None, min_length=1, description="why; needed where answers hold one")


class TeacherSettings(Settings):
    """Who writes rationales (`sftcore rationales`)."""

    backend: Literal["server", "local"] = Field(
        "server", description="an OpenAI-compatible server, or a model in this process"
    )
    model: str = Field("", description="the server's name for it; local: a folder (empty: model.path)")
    base_url: Annotated[str, AfterValidator(_web_address)] | None = Field(
        None,
        description="of the server, e.g. http://127.0.0.1:8000/v1; a password in it is written nowhere:"
        " copies of the recipe hold *** instead",
    )
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable that holds the key")
    concurrency: Positive = Field(8, description="requests under way at once")
    timeout_seconds: Seconds = Field(60.0, description="of one prompt, its retries and waits included")
    max_retries: Natural = Field(6, description="after 429, 5xx, lost lines")
    temperature: NonNegative = Field(0.0, description="0: greedy")
    max_new_tokens: Positive = Field(160, description="tokens per reply")
    input_price: NonNegative = Field(0.0, description="of a million input tokens, in any currency")
    output_price: NonNegative = Field(0.0, description="of a million output tokens")

    @field_serializer("base_url")
    def _without_password(self, base_url: str | None) -> str | None:
        return base_url and masked(base_url)

    @model_validator(mode="after")
    def _complete(self) -> TeacherSettings:
        if self.backend == "server" and not self.model:
            raise ValueError("a server needs `model`, its name for the model")
        if self.backend == "local" and self.temperature:
            raise ValueError("the local teacher decodes greedily: set temperature: 0")
        return self


class MatchingSettings(Settings):
    """Text matching: the pair in a prompt -> the label as text, or as one of two classes."""

    mode: Literal["generative", "discriminative", "encoder"] = Field(
        "generative",
        description="predict the label as text; by a linear layer on the last token's state; or with a"
        " BERT-type encoder's classifier",
    )
    pooling: Literal["last", "mean"] = Field(
        "last",
        description="discriminative only: the state of the last token is classified, or the mean state",
    )
    layers: Literal[1, 2] = Field(
        1, description="discriminative only: a linear classifier, or one with a hidden layer before it"
    )
    prompt: Literal["concise", "complex"] = Field(
        "concise", description="bare pair, or full task description"
    )
    wording: Annotated[int, Field(ge=0, le=3)] = Field(
        0, description="0: the prompt itself; 1 to 3: a paraphrase of it"
    )
    examples: list[PairExample] = Field([], description="solved pairs put before each prompt (few-shot)")
    language: Literal["auto", "zh", "en"] = Field(
        "auto", description="prompt language; auto: by each pair's script"
    )
    labels: LabelWords = Field(default_factory=lambda: LabelWords(), description="label words")
    predict: Literal["auto", "likelihood", "generate"] = Field(
        "auto",
        description="the likelier label text, or the text that is generated; auto: likelihood, unless a"
        " rationale comes first",
    )
    normalise: Literal["sum", "mean"] = Field(
        "sum", description="a label text's score: its tokens' log-likelihoods added up, or their mean"
    )
    rationale: Literal["none", "before", "after"] = Field(
        "none", description="train on the pairs' rationales: before the label, after it, or not at all"
    )
    teacher: TeacherSettings | None = Field(None, description="who writes rationales")

    @model_validator(mode="after")
    def _honoured(self) -> MatchingSettings:
        if self.mode != "generative":
            given = {"rationale": self.rationale != "none", "predict": self.predict != "auto"}
            if refused := [key for key, is_given in given.items() if is_given]:
                raise ValueError(f"mode {self.mode} predicts no text, so it has no {', '.join(refused)}")
        if self.mode != "discriminative" and not self.has_plain_classifier:
            raise ValueError("pooling and layers are for mode discriminative")
        if self.rationale == "before" and self.predict == "likelihood":
            raise ValueError("a rationale before the label has to be generated: set predict: generate")
        if self.rationale != "none" and any(example.rationale is None for example in self.examples):
            raise ValueError(f"with rationale: {self.rationale} each of the examples needs a rationale")
        if self.rationale != "none" and self.prompt == "complex" and self.wording:
            raise ValueError("the complex prompt that asks for a rationale has one wording: set wording: 0")
        return self

    @property
    def has_plain_classifier(self) -> bool:
        """Whether a classifier is transformers' own kind: linear, on the last token's state."""
        return self.pooling == "last" and self.layers == 1

    @property
    def compares_likelihoods(self) -> bool:
        """Whether a label is predicted by its text's likelihood."""
        return self.predict == "likelihood" or (self.predict == "auto" and self.rationale != "before")


DROPOUT = "on the adapters' inputs; with batch.samples_per_step its masks depend on the number of ranks"


class AdapterSettings(Settings):
    """What is trained: all weights, or low-rank updates next to frozen ones."""

    kind: Literal["none", "lora", "qlora"] = Field(
        "none", description="none: full fine-tuning; qlora: LoRA next to 4-bit weights"
    )
    r: Positive = Field(16, description="rank of the updates")
    alpha: Positive = Field(32, description="updates are scaled by alpha / r")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description=DROPOUT)
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="names of linear layers, such as [q_proj, v_proj]"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(r)")
    dora: bool = Field(False, description="train each row's magnitude apart (DoRA)")


class TrackingSettings(Settings):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = Field(True, description="write TensorBoard event files")
    to: Literal["trackio", "wandb"] | None = Field(None, description="a tracker of runs, besides TensorBoard")
    project: str = Field("sftcore", description="the project's name in that tracker")


class TrainSettings(Settings):
    """The optimisation."""

    epochs: Annotated[int, Field(gt=0, le=100_000)] = Field(1, description="passes over the training samples")
    lr: Annotated[float, Field(gt=0, le=MAX_COUNT)] | Literal["auto"] = Field(
        "auto",
        description=f"peak learning rate; auto: {FULL_LR:g}, with an adapter {ADAPTER_LR:g} (QLoRA's,"
        " arXiv 2305.14314); a run that has begun keeps its own",
    )
    scheduler: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="decay after warm-up; wsd: stable, then a linear decay over the last steps"
    )
    warmup_ratio: Fraction = Field(0.0, description="share of the steps with a rising rate")
    decay_ratio: Fraction = Field(0.2, description="wsd only: share of the steps with a falling rate")
    min_lr_ratio: Fraction = Field(0.0, description="share of lr that the decay goes down to")
    weight_decay: NonNegative = Field(0.0, description="not applied to norms and biases")
    max_grad_norm: NonNegative = Field(1.0, description="gradient norm is clipped to this; 0 does not clip")
    optimizer: Literal["adamw", "adamw-8bit", "muon"] = Field(
        "adamw",
        description="8-bit: moments in 2 bytes a parameter instead of 8; muon: for the layers' matrices,"
        " AdamW for the rest; deepspeed: zero0 only",
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="decay of AdamW's two moments")
    eps: Annotated[float, Field(gt=0, le=MAX_COUNT)] = Field(
        1e-8, description="AdamW's, next to the root of the second"
    )
    normalise: Literal["token", "sample"] = Field(
        "token", description="mean over trained tokens, or over samples"
    )
    activation_checkpointing: Literal["none", "full"] = Field(
        "none", description="recompute layers in backward"
    )
    z_loss: NonNegative = Field(0.0, description="weight of log(Z)^2 per trained token")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of uniform target")
    init_adapter: PathText | None = Field(
        None,
        description="adapter folder to go on from; its rank and alpha have to be the recipe's, and its"
        " targets where adapter.targets lists some (all-linear: its own go on)",
    )
    hang_seconds: Seconds | None = Field(
        None, description="a step that takes longer ends the job; null: max(300, 10 median steps)"
    )
    evaluate_every_steps: Positive | None = Field(
        None, description="optimizer steps between losses on data.valid; null: once an epoch"
    )
    patience: Positive | None = Field(
        None, description="stop after this many losses on data.valid without a new lowest; null: never"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="weights that become the result: the last, or those with the lowest valid loss"
    )

    @property
    def peak_lr(self) -> float:
        """`lr` as a number; in a `Recipe` it is one, decided by the adapter."""
        return FULL_LR if self.lr == "auto" else self.lr

    @model_validator(mode="after")
    def _phases_fit(self) -> TrainSettings:
        if self.scheduler == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError("warmup_ratio + decay_ratio must not be over 1")
        return self
