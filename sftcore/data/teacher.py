"""A teacher behind an OpenAI-compatible server: prompts -> replies, kept as they come.

In: prompts by key, where the server is. Out: replies by key; a cache file that a killed run goes on from.
Invariant: each prompt ends as one reply or one failure, and the counts say so; a reply is on disk before it
counts; the key comes from the environment and is written nowhere.
Trade-off: retries are the client's (429, 5xx, time-outs and lost connections, after 0.5 s to 8 s or as long
as the server says); a prompt that fails after `max_retries` of them is asked again by the next run only, so
one bad pair costs a minute, not the run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.fsio import append_jsonl, fingerprint_of, read_jsonl
from sftcore.log import progress
from sftcore.settings import TeacherSettings

log = logging.getLogger(__name__)
T = TypeVar("T")
FAILURES_IN_A_ROW = 20  # of a server that is gone: stop instead of waiting for all the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a teacher wrote (empty if nothing usable), and what it counted."""

    text: str
    num_input_tokens: int = 0
    num_output_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no reply."""

    why: str


Ask = Callable[[str], Reply | Failure]


class ReplyCache:
    """Replies by a fingerprint of who was asked what, in a JSONL file that grows line by line."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = dict(identity)
        rows = read_jsonl(path) if path.is_file() else []
        self._known = {row.pop("key"): Reply(**row) for row in rows}
        if rows:
            self._mend()

    def _mend(self) -> None:
        """End a line that was torn by a kill, so that the next one starts afresh."""
        with open(self.path, "rb+") as handle:
            content = handle.read()
            handle.truncate(content.rfind(b"\n") + 1)

    def _key(self, prompt: str) -> str:
        return fingerprint_of({**self.identity, "prompt": prompt})

    def get(self, prompt: str) -> Reply | None:
        """The reply to this prompt, if there is one."""
        return self._known.get(self._key(prompt))

    def put(self, prompt: str, reply: Reply) -> None:
        """Write a reply down."""
        key = self._key(prompt)
        append_jsonl(self.path, {"key": key, **asdict(reply)})
        self._known[key] = reply


def connect(settings: TeacherSettings) -> Ask:
    """A function that asks the server once (with the client's retries).

    Raises:
        MissingEnvironmentError: the `openai` package is missing.
    """
    try:
        import openai
    except ImportError as error:
        remedy = "pip install 'sftcore[serve]'"
        raise MissingEnvironmentError(
            Problem(what="a teacher on a server needs the openai package", remedy=remedy)
        ) from error
    client = openai.OpenAI(
        base_url=settings.base_url,
        api_key=os.environ.get(settings.key_variable, "none"),
        timeout=settings.timeout_seconds,
        max_retries=settings.max_retries,
    )

    def ask(prompt: str) -> Reply | Failure:
        try:
            answer: Any = client.chat.completions.create(
                model=settings.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=settings.temperature,
                max_tokens=settings.max_new_tokens,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise _refused(settings, f"HTTP {error.status_code}") from error
        except openai.APIError as error:
            return Failure(why=type(error).__name__)
        except ValueError:  # a body that is no JSON
            return Reply(text="")
        return _reply_of(answer) if isinstance(answer, openai.types.chat.ChatCompletion) else Reply(text="")

    return ask


def _refused(settings: TeacherSettings, what: str) -> UserInputError:
    remedy = f"check matching.teacher (base_url, model) and the key in ${settings.key_variable}"
    return UserInputError(
        Problem(what=f"the teacher's server refuses: {what}", where=str(settings.base_url), remedy=remedy)
    )


def _reply_of(answer: Any) -> Reply:
    usage, choices = answer.usage, answer.choices
    return Reply(
        text=(choices[0].message.content or "") if choices else "",
        num_input_tokens=usage.prompt_tokens if usage else 0,
        num_output_tokens=usage.completion_tokens if usage else 0,
    )


def ask_all(
    prompts: Mapping[str, str], ask: Ask, cache: ReplyCache, *, concurrency: int
) -> dict[str, Reply | Failure]:
    """Ask what the cache does not know, `concurrency` prompts at a time.

    Args:
        prompts: by the caller's key.

    Returns:
        a reply or a failure for every key.

    Raises:
        MissingEnvironmentError: `FAILURES_IN_A_ROW` prompts failed one after another; replies are kept.
        UserInputError: the server refuses the key or the model.
    """
    known = {key: cache.get(prompt) for key, prompt in prompts.items()}
    results: dict[str, Reply | Failure] = {key: reply for key, reply in known.items() if reply}
    todo = [key for key, reply in known.items() if reply is None]
    log.info("%d of %d replies are in %s", len(results), len(prompts), cache.path)
    num_failed_in_a_row = 0
    with progress("asking the teacher", len(todo)) as advance:
        for key, result in _in_threads(todo, lambda key: ask(prompts[key]), concurrency):
            results[key] = result
            if isinstance(result, Reply):
                cache.put(prompts[key], result)
            num_failed_in_a_row = 0 if isinstance(result, Reply) else num_failed_in_a_row + 1
            if num_failed_in_a_row == FAILURES_IN_A_ROW:
                raise _gone(results, cache)
            advance(1)
    return results


def _in_threads(keys: Sequence[str], work: Callable[[str], T], concurrency: int) -> Iterator[tuple[str, T]]:
    """Results as they come; no more than `concurrency` calls are under way or waiting."""
    todo = iter(keys)
    with ThreadPoolExecutor(concurrency) as pool:
        running = {pool.submit(work, key): key for key in islice(todo, concurrency)}
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
            running |= {pool.submit(work, key): key for key in islice(todo, concurrency - len(running))}


def _gone(results: Mapping[str, Reply | Failure], cache: ReplyCache) -> MissingEnvironmentError:
    whys = sorted({result.why for result in results.values() if isinstance(result, Failure)})
    num_replies = sum(isinstance(result, Reply) for result in results.values())
    return MissingEnvironmentError(
        Problem(
            what=f"the teacher failed {FAILURES_IN_A_ROW} times in a row: {', '.join(whys)}",
            where=str(cache.path),
            got=f"{num_replies} replies are kept there",
            remedy="see that the server runs, then start again: only what is missing is asked",
        )
    )
