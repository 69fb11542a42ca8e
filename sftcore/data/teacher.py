"""A teacher behind an OpenAI-compatible server: prompts -> replies, kept as they come.

In: prompts by key, where the server is. Out: replies by key; a cache file that a killed run goes on from.
Invariant: each prompt ends as one reply or one failure, and the counts say so; a reply with a text is on disk
before it counts; the key comes from the environment and is written nowhere.
Trade-off: retries are the client's (429, 5xx, time-outs and lost connections, after 0.5 s to 8 s or as long
as the server says); a prompt that fails after `max_retries` of them, or gets an empty reply (which counts,
with its tokens), is asked again by the next run only, so one bad pair costs a minute, not the run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.fsio import append_jsonl, fingerprint_of, write_jsonl
from sftcore.log import progress
from sftcore.settings import TeacherSettings

log = logging.getLogger(__name__)
T = TypeVar("T")
GARBLED = "no chat completion in the answer"
FAILURES_IN_A_ROW = 20  # of a server that is gone: stop instead of waiting for all the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a teacher wrote, and what it counted."""

    text: str
    num_input_tokens: int = 0
    num_output_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no reply."""

    why: str


ROW_KEYS = {"key", *(field.name for field in fields(Reply))}
Ask = Callable[[str], Reply | Failure]


class ReplyCache:
    """Replies by a fingerprint of who was asked what, in a JSONL file that grows line by line."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = dict(identity)
        self._known = {row.pop("key"): Reply(**row) for row in self._read()}

    def _read(self) -> list[dict[str, Any]]:
        """The lines that hold a reply; a file with others (torn by a kill) is written anew without them."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        *lines, last = content.split(b"\n")
        rows = [row for line in (*lines, last) if (row := _row_of(line))]
        if last or len(rows) < len(lines):
            write_jsonl(self.path, rows)
        return rows

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


def _row_of(line: bytes) -> dict[str, Any] | None:
    """A line's key and reply, or None where there is no whole one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.keys() == ROW_KEYS else None


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
            return Failure(why=GARBLED)
        is_reply = isinstance(answer, openai.types.chat.ChatCompletion)
        return _reply_of(answer) if is_reply else Failure(why=GARBLED)

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
    results: dict[str, Reply | Failure] = {
        k: reply for k, reply in known.items() if reply and not _fault(reply)
    }
    todo = [key for key in prompts if key not in results]
    log.info(
        "%d prompts to ask; %d of %d replies are in %s", len(todo), len(results), len(prompts), cache.path
    )
    num_failed_in_a_row = 0
    with progress("asking the teacher", len(todo)) as advance:
        for key, result in _in_threads(todo, lambda key: ask(prompts[key]), concurrency):
            results[key] = result
            if isinstance(result, Reply) and not _fault(result):
                cache.put(prompts[key], result)
            num_failed_in_a_row = num_failed_in_a_row + 1 if _fault(result) else 0
            if num_failed_in_a_row == FAILURES_IN_A_ROW:
                raise _gone(results, cache)
            advance(1)
    return results


def _fault(result: Reply | Failure) -> str:
    """Why there is nothing to read; empty if there is."""
    if isinstance(result, Failure):
        return result.why
    return "" if result.text.strip() else "empty reply"


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
    whys = sorted({fault for result in results.values() if (fault := _fault(result))})
    num_replies = sum(not _fault(result) for result in results.values())
    return MissingEnvironmentError(
        Problem(
            what=f"the teacher failed {FAILURES_IN_A_ROW} times in a row: {', '.join(whys)}",
            where=str(cache.path),
            got=f"{num_replies} replies are kept there",
            remedy="see that the server runs, then start again: only what is missing is asked",
        )
    )
