"""`sftcore generate`: what a run's model says to prompts of your own.

In: a run folder or a model folder, a text or a JSONL file. Out: a completion a prompt.
Invariant: a prompt gets the form in which the run was trained: its template, the model's chat template, or
none; decoding is that of evaluation, greedy unless a temperature is given.
Trade-off: answers come when all are done, 32 prompts at a time; to serve a model, give RUN/model to a server.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from sftcore.config import ModelSettings, Recipe
from sftcore.data.chat import ANY_DAY, ChatRefused, ChatRenderer
from sftcore.data.contents import Chat, Fact, Fields, Message, OddRow
from sftcore.data.ledger import Reason, Rejection
from sftcore.data.rows import RawRow, has_surrogates, ignore, json_rows
from sftcore.data.tokens import Codec, codec_of, load_tokenizer
from sftcore.data.turns import parse_message
from sftcore.data.wording import load_template
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import read_json
from sftcore.generate.api import Decoding, complete_all
from sftcore.generate.own import OwnGenerator
from sftcore.hub import require_models
from sftcore.model.adapters import is_adapter
from sftcore.model.identity import base_of
from sftcore.model.load import load_for_decoding
from sftcore.model.positions import position_limit
from sftcore.run_recipe import read_run_recipe
from sftcore.settings import MATCHING_FILE
from sftcore.tasks import TASKS
from sftcore.tasks.kinds.fact import fact_texts
from sftcore.tasks.template import Template

log = logging.getLogger("sftcore.generating")
PROMPTS_PER_BATCH = 32
ASKED = ("prompt", "question")  # fields of a row that hold the text
MAX_PROBLEMS_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to decode.

    Args:
        max_new_tokens: of a completion.
        temperature: 0: greedy.
        seed: of the draws, where the temperature is over 0.
        verbatim: put prompts into no template.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 17
    verbatim: bool = False


def generate_text(folder: Path, prompt: str, settings: Settings) -> str:
    """The completion of one prompt.

    Raises:
        UserInputError: no run or model there, or one that does not generate; a prompt that it can't take.
    """
    if has_surrogates(prompt):
        raise UserInputError(Problem(what="this is not UTF-8 text", where="--prompt", got=prompt))
    return generate(folder, [prompt], settings)[0]


def generate(folder: Path | str, prompts: Sequence[str], settings: Settings | None = None) -> list[str]:
    """The completions of prompts.

    Args:
        folder: of a run, or of a model.

    Raises:
        UserInputError: as `generate_text`.
    """
    return _complete(_found(Path(folder)), prompts, settings or Settings())


def generate_rows(folder: Path, file: Path, settings: Settings) -> list[dict[str, Any]]:
    """The rows of a JSONL file with `generated` next to what they hold.

    Each has a `prompt` or `question`, or `messages`, of which a last assistant turn is left out.

    Raises:
        UserInputError: as `generate_text`; no such file, or rows of another form.
    """
    if not file.is_file():
        raise UserInputError(Problem(what="no such file", where=f"--file {file}"))
    rows = list(json_rows(file))
    problems, asked = [], []
    for row in rows:
        try:
            asked.append(_asked(row, file))
        except OddRow as odd:
            number = row.number if isinstance(row, RawRow) else row.row
            needed = "a row needs prompt, question or messages [{role, content}]"
            problems.append(Problem(what=odd.detail, where=f"{file}:{number}", remedy=needed))
    if problems or not rows:
        nothing = Problem(what="the file holds no rows", where=str(file))
        raise UserInputError(*(problems[:MAX_PROBLEMS_SHOWN] or [nothing]))
    texts = _complete(_found(folder), asked, settings)
    values = [row.value for row in rows if isinstance(row, RawRow)]
    return [{**value, "generated": text} for value, text in zip(values, texts, strict=True)]


def _asked(row: RawRow | Rejection, file: Path) -> str | Chat:
    if isinstance(row, Rejection):
        raise OddRow(row.reason, row.detail)
    fields = Fields(row=row, file=str(file), note=ignore)
    if not fields.has("messages"):
        name = next((name for name in ASKED if fields.has(name)), ASKED[0])
        return fields.text(name, verbatim=True)
    turns = fields.get("messages")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise OddRow(Reason.WRONG_TYPE, "'messages' must be a list of {role, content}")
    messages = [parse_message(fields, turn) for turn in turns]
    return Chat(messages=_open_ended(messages))


def _open_ended(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Turns that end with an assistant's, which is not looked at."""
    is_answered = messages[-1].role == "assistant"
    return (*messages,) if is_answered else (*messages, Message(role="assistant", content=""))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A model that generates.

    Args:
        folder: of the model or adapter.
        recipe: that it was trained with; None: of a model without one.
    """

    folder: Path
    recipe: Recipe | None

    @property
    def settings(self) -> ModelSettings:
        """How to load it: as the recipe says, else in the dtype that its configuration names."""
        path = str(self.folder.resolve())
        if self.recipe:
            return self.recipe.model.model_copy(update={"path": path})
        config = self.folder / "config.json"
        values = read_json(config) if config.is_file() else {}
        is_exact = values.get("dtype", values.get("torch_dtype")) == "float32"
        return ModelSettings(path=path, dtype="float32" if is_exact else "auto")


def _found(folder: Path) -> _Found:
    """The model of a run, or of a folder; a run's own model folder counts as the run's."""
    run = next((path for path in (folder, folder.resolve().parent) if (path / "recipe.yaml").is_file()), None)
    recipe = _recipe_of(run) if run else None
    model = folder
    if recipe and run == folder:
        model = run / recipe.result_folder.name
        if not model.is_dir():
            remedy = "finish it: sftcore train RECIPE"
            raise UserInputError(Problem(what="this run has no result yet", where=str(run), remedy=remedy))
    if not (model / "config.json").is_file() and not is_adapter(model):
        remedy = "give runs/NAME, its model or adapter folder, or a Hugging Face model folder"
        raise UserInputError(Problem(what="no run and no model here", where=str(folder), remedy=remedy))
    if (recipe and TASKS[recipe.task].answers == "labels") or (model / MATCHING_FILE).is_file():
        remedy = "score pairs with it: sftcore match DIR --pairs FILE"
        raise UserInputError(Problem(what="a model for text matching", where=str(folder), remedy=remedy))
    if is_adapter(model):
        require_models([base_of(model)])
    return _Found(folder=model, recipe=recipe)


def _recipe_of(run: Path) -> Recipe:
    return Recipe.model_validate(read_run_recipe(run))


def _complete(found: _Found, asked: Sequence[str | Chat], settings: Settings) -> list[str]:
    """A text for each prompt."""
    trust = found.settings.trust_remote_code
    codec = codec_of(load_tokenizer(found.settings.path, trust))
    prompts, turn_ends = _encode(found, codec, asked, verbatim=settings.verbatim)
    quantised = found.recipe is not None and found.recipe.adapter.kind == "qlora" and is_adapter(found.folder)
    model = load_for_decoding(found.settings, quantised=quantised)
    _check_lengths(model, prompts, settings.max_new_tokens)
    draws = np.random.default_rng(settings.seed).random((len(prompts), settings.max_new_tokens))
    decoding = Decoding(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        uniforms=draws,
        stop_ids=frozenset(turn_ends),
    )
    generator = OwnGenerator(model, codec.tokenizer)
    texts = [""] * len(prompts)
    for i, (reply,) in complete_all(
        generator, prompts, decoding, prompts_per_batch=PROMPTS_PER_BATCH, label="generating"
    ):
        texts[i] = reply.text
    return texts


def _encode(
    found: _Found, codec: Codec, asked: Sequence[str | Chat], *, verbatim: bool
) -> tuple[list[list[int]], set[int]]:
    """Ids of each prompt in the form of training, and the tokens that end a turn of a chat."""
    template = None if verbatim else _template_of(found.recipe)
    talks = not verbatim and template is None and _talks(found.recipe, codec)
    if talks:
        asked = [_question(text) if isinstance(text, str) else text for text in asked]
    form = f"template {template.name}" if template else "the chat template" if talks else "no template"
    log.info("texts are put into %s", form)
    if all(isinstance(item, str) for item in asked):
        return codec.encode_prompts([_filled(str(text), template) for text in asked]), set()
    renderer = ChatRenderer(codec, found.recipe.data.today if found.recipe else ANY_DAY)
    ids = [_chat_ids(item, renderer, codec, template) for item in asked]
    return ids, {renderer.end_of_turn_id}


def _chat_ids(item: str | Chat, renderer: ChatRenderer, codec: Codec, template: Template | None) -> list[int]:
    if isinstance(item, str):
        return codec.encode_prompts([_filled(item, template)])[0]
    try:
        return codec.encode([renderer.prompt(item)])[0]
    except ChatRefused as error:
        raise UserInputError(Problem(what=str(error), where="messages")) from error


def _filled(text: str, template: Template | None) -> str:
    """The prompt of a question (or of a subject, where the template asks for one)."""
    if template is None:
        return text
    return fact_texts(Fact(relation="", subject=text, answers=("",), question=text), template)[0]


def _question(text: str) -> Chat:
    return Chat(messages=_open_ended([Message(role="user", content=text)]))


def _template_of(recipe: Recipe | None) -> Template | None:
    """The run's template, if it was trained on facts."""
    if recipe is None or not TASKS[recipe.task].has_facts:
        return None
    formats = {source.format for source in recipe.data.train}
    return (
        load_template(recipe.data.template, task=recipe.task)
        if formats & {"facts", "entityquestions"}
        else None
    )


def _talks(recipe: Recipe | None, codec: Codec) -> bool:
    """Whether a text is a user's turn: of a chat's run, or of a model with a chat template and no run."""
    return bool(codec.tokenizer.chat_template) and (recipe is None or TASKS[recipe.task].talks)


def _check_lengths(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    empty = [number for number, prompt in enumerate(prompts, 1) if not prompt]
    if empty:
        raise UserInputError(Problem(what="a prompt without tokens", where=f"prompt {empty[0]}"))
    limit, longest = position_limit(model.config), max(map(len, prompts)) + max_new_tokens - 1
    if limit is not None and longest > limit:
        got = f"{longest} tokens with --max-new-tokens {max_new_tokens}"
        raise UserInputError(Problem(what="longer than the model has positions", got=got, allowed=str(limit)))
