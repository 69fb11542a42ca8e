"""A model at an OpenAI-compatible server: prompts -> replies, kept as they come.

In: prompts as texts, where the server is. Out: replies; a cache file that a killed run goes on from.
Invariant: each prompt ends as one reply or one failure, and the counts say so; a reply with a text is on disk
before it counts; the key comes from the environment and is written nowhere.
Trade-off: retries are the client's (429, 5xx and lost connections, after 0.5 s to 8 s or as long as the
server says); a prompt without a whole reply after `max_retries` of them or `timeout_seconds` in all, or with
an empty one (which counts, with its tokens), is asked again by the next run only, so one bad pair costs a
minute, not the run. One event loop asks: a call given up is cancelled, and no thread is left waiting for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from sftcore.amounts import counted
from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.fsio import append_jsonl, fingerprint_of, write_jsonl
from sftcore.generate.api import Decoding, Reply
from sftcore.log import progress
from sftcore.settings import TeacherSettings

log = logging.getLogger(__name__)
GARBLED = "no chat completion in the answer"
FAILURES_IN_A_ROW = 20  # of a server that is gone: stop instead of waiting for all the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no reply."""

    why: str


ROW_KEYS = {"key", *(field.name for field in fields(Reply))}
Ask = Callable[[str], Awaitable[Reply | Failure]]
Key = TypeVar("Key")


class ReplyCache:
    """Replies by a fingerprint of who was asked what, in a JSONL file that grows line by line."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = dict(identity)
        self._known = {row["key"]: _reply_in(row) for row in self._read()}

    def _read(self) -> list[dict[str, Any]]:
        """The lines that hold a reply; a file with others (torn by a kill) is written again without them."""
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
    is_reply = isinstance(row, dict) and row.keys() == ROW_KEYS
    return row if is_reply and isinstance(row["key"], str) and isinstance(row["text"], str) else None


def _reply_in(row: Mapping[str, Any]) -> Reply:
    """A line's reply (an earlier version wrote null for counts that a server had left out)."""
    counts = {name: _count(row[name]) for name in ("num_input_tokens", "num_output_tokens")}
    return Reply(text=row["text"], **counts)


@dataclass(frozen=True, slots=True)
class ServerGenerator:
    """A server's model.

    Args:
        settings: where it is, and how often it is asked.
        cache: of its replies, by all that decides them.
    """

    settings: TeacherSettings
    cache: ReplyCache

    def complete(self, prompts: Sequence[str], decoding: Decoding) -> list[list[Reply | Failure]]:
        """The reply to each prompt, or why there is none."""
        assert decoding.completions_per_prompt == 1, "a prompt has one reply in the cache"
        server = connect(self.settings, decoding)
        found = ask_all(dict(enumerate(prompts)), server, self.cache, concurrency=self.settings.concurrency)
        return [[found[number]] for number in range(len(prompts))]


def connect(settings: TeacherSettings, decoding: Decoding) -> AbstractAsyncContextManager[Ask]:
    """What opens a connection to the server and yields a function that asks it once (with its retries).

    Raises:
        MissingEnvironmentError: the `openai` package is missing, or the key is no key.
    """
    try:
        import openai
    except ImportError as error:
        remedy = "pip install 'sftcore[serve]'"
        raise MissingEnvironmentError(
            Problem(what="a teacher on a server needs the openai package", remedy=remedy)
        ) from error
    return _connection(openai, settings, decoding, _key(settings.key_variable))


def _key(variable: str) -> str:
    """The key without spaces around it; "none" (which local servers ignore) where there is none."""
    key = os.environ.get(variable, "").strip() or "none"
    if key.isascii() and key.isprintable():
        return key
    what = "the key is not of printable ASCII characters, so no request can carry it"
    raise MissingEnvironmentError(Problem(what=what, where=f"${variable}", remedy="export the key again"))


@asynccontextmanager
async def _connection(
    openai: Any, settings: TeacherSettings, decoding: Decoding, key: str
) -> AsyncIterator[Ask]:
    async def ask(prompt: str) -> Reply | Failure:
        try:
            async with asyncio.timeout(settings.timeout_seconds):
                answer = await client.chat.completions.with_raw_response.create(
                    model=settings.model,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=decoding.temperature,
                    max_tokens=decoding.max_new_tokens,
                )
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise _refused(settings, f"HTTP {error.status_code}") from error
        except openai.APIError as error:
            return Failure(why=type(error).__name__)
        except TimeoutError:
            return Failure(why=f"no whole reply in {settings.timeout_seconds:g} s")
        return _reply_of(answer.content)

    # timeout=None: the client's own bounds each read alone, so a reply in drips would last for ever
    async with openai.AsyncOpenAI(
        base_url=settings.base_url, api_key=key, timeout=None, max_retries=settings.max_retries
    ) as client:
        yield ask


def _refused(settings: TeacherSettings, what: str) -> UserInputError:
    remedy = f"check matching.teacher (base_url, model) and the key in ${settings.key_variable}"
    return UserInputError(
        Problem(what=f"the teacher's server refuses: {what}", where=str(settings.base_url), remedy=remedy)
    )


def _reply_of(body: bytes) -> Reply | Failure:
    """What a server's answer says, whatever it holds; counts that are not there are 0."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return Failure(why=GARBLED)
    text: str | None = None
    match answer:
        case {"choices": []}:
            text = ""
        case {"choices": [{"message": {"content": str() | list() | None as content}}, *_]}:
            text = _text_of(content)
    if text is None:
        return Failure(why=GARBLED)
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        text=text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
        num_input_tokens=_count(usage.get("prompt_tokens")),
        num_output_tokens=_count(usage.get("completion_tokens")),
    )


def _text_of(content: str | list[Any] | None) -> str | None:
    """A message's text; of a list the text parts, joined; None if there is none to read.

    >>> _text_of([{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}])
    'ab'
    """
    if not isinstance(content, list):
        return content or ""
    texts = [text for part in content for text in _texts_of_part(part)]
    return "".join(texts) if texts or not content else None


def _texts_of_part(part: Any) -> list[str]:
    match part:
        case {"type": "text" | "output_text", "text": str() as text}:
            return [text]
    return []


def _count(value: Any) -> int:
    """A count of tokens; 0 for what is none."""
    return value if type(value) is int and value >= 0 else 0


def ask_all(
    prompts: Mapping[Key, str],
    server: AbstractAsyncContextManager[Ask],
    cache: ReplyCache,
    *,
    concurrency: int,
) -> dict[Key, Reply | Failure]:
    """Ask what the cache does not know, `concurrency` prompts at a time.

    Args:
        prompts: by the caller's key.
        server: from `connect`, for this call alone.
        cache: of replies by prompt; what comes is put into it.

    Returns:
        a reply or a failure for every key.

    Raises:
        MissingEnvironmentError: `FAILURES_IN_A_ROW` prompts failed one after another; replies are kept.
        UserInputError: the server refuses the key or the model.
    """
    known = {key: cache.get(prompt) for key, prompt in prompts.items()}
    results: dict[Key, Reply | Failure] = {
        k: reply for k, reply in known.items() if reply and not _fault(reply)
    }
    todo = {key: prompt for key, prompt in prompts.items() if key not in results}
    log.info(
        "%s to ask; %d of %d replies are in %s",
        counted(len(todo), "prompt"),
        len(results),
        len(prompts),
        cache.path,
    )
    with progress("asking the teacher", len(todo)) as advance:
        asyncio.run(_ask_missing(todo, server, results, cache, concurrency, advance))
    return results


async def _ask_missing(
    todo: Mapping[Key, str],
    server: AbstractAsyncContextManager[Ask],
    results: dict[Key, Reply | Failure],
    cache: ReplyCache,
    concurrency: int,
    advance: Callable[[int], Any],
) -> None:
    """Put what comes into `results`, and replies with a text into the cache."""
    num_failed_in_a_row = 0
    async with server as ask, aclosing(_as_they_come(todo, ask, concurrency)) as coming:
        async for key, result in coming:
            results[key] = result
            if isinstance(result, Reply) and not _fault(result):
                cache.put(todo[key], result)
            num_failed_in_a_row = num_failed_in_a_row + 1 if _fault(result) else 0
            if num_failed_in_a_row == FAILURES_IN_A_ROW:
                raise _gone(results, cache)
            advance(1)


def _fault(result: Reply | Failure) -> str:
    """Why there is nothing to read; empty if there is."""
    if isinstance(result, Failure):
        return result.why
    return "" if result.text.strip() else "empty reply"


async def _as_they_come(
    prompts: Mapping[Key, str], ask: Ask, concurrency: int
) -> AsyncGenerator[tuple[Key, Reply | Failure], None]:
    """Results by key; no more than `concurrency` calls are under way, and none when this ends."""
    todo = iter(prompts)

    def start(count: int) -> dict[asyncio.Future[Reply | Failure], Key]:
        return {asyncio.ensure_future(ask(prompts[key])): key for key in islice(todo, count)}

    running = start(concurrency)
    try:
        while running:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
            running |= start(concurrency - len(running))
    finally:
        for future in running:
            future.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _gone(results: Mapping[Key, Reply | Failure], cache: ReplyCache) -> MissingEnvironmentError:
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
