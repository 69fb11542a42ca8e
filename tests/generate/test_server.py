"""A teacher that is busy, broken, slow or mad: each prompt is counted, replies last, keys stay secret."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sftcore.errors import MissingEnvironmentError, UserInputError
from sftcore.generate.api import Decoding, Reply
from sftcore.generate.server import (
    FAILURES_IN_A_ROW,
    Failure,
    ReplyCache,
    ServerGenerator,
    ask_all,
    connect,
)
from sftcore.settings import TeacherSettings

SLOW_SECONDS = 4.5


def chat(content, **more) -> str:
    """A server's answer around `content`, whatever that is."""
    head = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "usage": {}}
    choices = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}]
    return json.dumps(head | {"choices": choices} | more)


GARBLED = Failure(why="no chat completion in the answer")
MALFORMED = {
    "list": "[1, 2]",
    "deep": "[" * 100_000,
    "nothing": "{}",
    "no-choices": chat("", choices=None),
    "no-message": chat("", choices=[{"index": 0}]),
    "null-message": chat("", choices=[{"index": 0, "message": None}]),
    "text-choice": chat("", choices=["x"]),
    "number": chat(5),
    "pictures": chat([{"type": "image_url", "image_url": "x"}]),
    "parts": chat([{"type": "text", "text": "a"}, 7, {"type": "text", "text": "b"}]),
    "null-content": chat(None),
    "many": chat("a", usage="many"),
    "odd-counts": chat("a", usage={"prompt_tokens": None, "completion_tokens": "5"}),
    "surrogate": chat("a\ud800b\U0001f600"),
}
READABLE = {
    "parts": "ab",
    "null-content": "",
    "many": "a",
    "odd-counts": "a",
    "surrogate": "a\ufffdb\U0001f600",
}


class Moody(BaseHTTPRequestHandler):
    """A server whose answer depends on the first word of the prompt."""

    asked: Counter[str] = Counter()
    keys: set[str] = set()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        type(self).asked[prompt] += 1
        type(self).keys.add(self.headers["Authorization"])
        mood = prompt.split()[0]
        if mood == "slow":
            time.sleep(SLOW_SECONDS)
        if mood == "busy" and self.asked[prompt] < 3:
            return self.answer(429, "{}", retry_after="0")
        if mood in ("broken", "refused"):
            return self.answer(500 if mood == "broken" else 401, "{}")
        if mood == "page":
            return self.answer(200, "<html>hello</html>", kind="text/html")
        if mood == "torn":
            return self.answer(200, '{"choices": [')
        if mood == "drip":
            return self.drip()
        if mood in MALFORMED:
            return self.answer(200, MALFORMED[mood])
        choices = [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": prompt[::-1]}}
        ]
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        head = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "usage": usage}
        self.answer(200, json.dumps({**head, "choices": [] if mood == "mute" else choices}))

    def answer(
        self, status: int, text: str, *, kind: str = "application/json", retry_after: str = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(text.encode())

    def drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(1000):
            try:
                self.wfile.write(b" ")
            except OSError:
                return
            time.sleep(0.1)

    def log_message(self, *_) -> None:
        """Quiet."""


@contextmanager
def moody_server():
    Moody.asked, Moody.keys = Counter(), set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def settings(base_url: str, **more) -> TeacherSettings:
    given = {
        "base_url": base_url,
        "model": "m",
        "timeout_seconds": 3,
        "max_retries": 2,
        "key_variable": "MOODY",
    }
    return TeacherSettings.model_validate(given | more)


def reach(base_url: str, **more):
    asked = settings(base_url, **more)
    return connect(asked, Decoding(max_new_tokens=asked.max_new_tokens))


def test_every_prompt_is_a_reply_or_a_failure_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MOODY", "sk-secret")
    moods = ("fine", "busy", "broken", "slow", "page", "torn", "mute")
    prompts = {f"{mood}-{i}": f"{mood} {i}" for mood in moods for i in range(2)}
    cache = ReplyCache(tmp_path / "replies.jsonl", {"model": "m"})
    with moody_server() as url:
        results = ask_all(prompts, reach(url), cache, concurrency=4)
        assert Moody.asked["busy 0"] == 3 and Moody.asked["broken 0"] == 3, "retried twice"
        assert results.keys() == prompts.keys()
        whys = {key: result.why for key, result in results.items() if isinstance(result, Failure)}
        assert {key.split("-")[0] for key in whys} == {"broken", "slow", "page", "torn"}
        assert whys["page-0"] == whys["torn-1"] == "no chat completion in the answer"
        assert whys["broken-0"] == "InternalServerError" and whys["slow-1"] == "no whole reply in 3 s"
        texts = {key: result.text for key, result in results.items() if isinstance(result, Reply)}
        assert texts == {"fine-0": "0 enif", "fine-1": "1 enif", "busy-0": "0 ysub", "busy-1": "1 ysub"} | {
            f"mute-{i}": "" for i in range(2)
        }
        before = Moody.asked.copy()
        again = ask_all(prompts, reach(url), ReplyCache(cache.path, {"model": "m"}), concurrency=4)
        new = Moody.asked - before
        asked_again = {prompt.split()[0] for prompt in new}
        assert asked_again == {"broken", "slow", "page", "torn", "mute"}, "only replies with a text stay"
        assert {k: r for k, r in again.items() if isinstance(r, Reply)} == {
            k: r for k, r in results.items() if isinstance(r, Reply)
        }
    assert Moody.keys == {"Bearer sk-secret"}
    written = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert "sk-secret" not in written + caplog.text
    assert sum(r.num_input_tokens for r in results.values() if isinstance(r, Reply)) == 7 * 6, (
        "mute counts too"
    )


def test_an_answer_of_the_wrong_shape_is_a_failure_or_read_as_far_as_it_goes(tmp_path):
    cache = ReplyCache(tmp_path / "replies.jsonl", {})
    with moody_server() as url:
        results = ask_all({mood: mood for mood in MALFORMED}, reach(url), cache, concurrency=4)
    assert results == {
        mood: Reply(text=READABLE[mood]) if mood in READABLE else GARBLED for mood in MALFORMED
    }
    kept = ReplyCache(cache.path, {})
    assert kept.get("surrogate") == results["surrogate"] and kept.get("number") is None


def test_a_reply_in_drips_and_a_silent_server_cost_the_time_out_once(tmp_path):
    prompts = {mood: f"{mood} 1" for mood in ("drip", "slow", "fine")}
    with moody_server() as url:
        connection = reach(url, timeout_seconds=0.5, max_retries=6)
        results = ask_all(prompts, connection, ReplyCache(tmp_path / "replies.jsonl", {}), concurrency=3)
        assert Moody.asked == {"drip 1": 1, "slow 1": 1, "fine 1": 1}
    late = Failure(why="no whole reply in 0.5 s")
    assert results.pop("fine").text == "1 enif" and results == {"drip": late, "slow": late}
    assert not [thread for thread in threading.enumerate() if "asyncio" in thread.name]


@pytest.mark.parametrize(("key", "sent"), [(" sk-secret\n", "sk-secret"), ("", "none"), (" \n", "none")])
def test_a_key_is_stripped_and_an_empty_one_is_none(tmp_path, monkeypatch, key, sent):
    monkeypatch.setenv("MOODY", key)
    with moody_server() as url:
        ask_all({"a": "fine 1"}, reach(url), ReplyCache(tmp_path / "r.jsonl", {}), concurrency=1)
    assert Moody.keys == {f"Bearer {sent}"}


@pytest.mark.parametrize("key", ["sk-sécret", "sk-\x07secret", "sk-a\nsk-b", "sk-\udcff"])
def test_a_key_that_no_header_holds_is_refused_by_its_variable(monkeypatch, key):
    monkeypatch.setenv("MOODY", key)
    with pytest.raises(MissingEnvironmentError, match=r"\$MOODY: .*printable ASCII") as caught:
        reach("http://127.0.0.1:1/v1")
    assert "sk-" not in str(caught.value)


def test_a_refused_key_stops_at_once_with_a_remedy(tmp_path):
    cache = ReplyCache(tmp_path / "replies.jsonl", {})
    with moody_server() as url, pytest.raises(UserInputError, match=r"HTTP 401\n.*\$MOODY"):
        ask_all({"a": "refused 1"}, reach(url), cache, concurrency=2)


def test_a_server_that_is_gone_stops_the_run_and_keeps_what_it_said(tmp_path):
    cache = ReplyCache(tmp_path / "replies.jsonl", {})
    prompts = {str(i): f"{'fine' if i < 5 else 'broken'} {i}" for i in range(100)}
    with moody_server() as url:
        ask = reach(url, max_retries=0)
        with pytest.raises(
            MissingEnvironmentError, match="20 times in a row: InternalServerError\n.*5 replies"
        ):
            ask_all(prompts, ask, cache, concurrency=1)
        assert sum(Moody.asked.values()) <= 5 + FAILURES_IN_A_ROW + 1
    assert len(cache.path.read_text().splitlines()) == 5


def test_another_model_is_asked_anew_and_a_torn_line_is_mended(tmp_path):
    cache = ReplyCache(tmp_path / "replies.jsonl", {"model": "m"})
    cache.put("p", Reply(text="r"))
    cache.put("q", Reply(text="s"))
    torn = cache.path.read_bytes()[:-5]
    cache.path.write_bytes(torn)
    reopened = ReplyCache(cache.path, {"model": "m"})
    assert reopened.get("p") == Reply(text="r") and reopened.get("q") is None
    reopened.put("q", Reply(text="t"))
    assert ReplyCache(cache.path, {"model": "m"}).get("q") == Reply(text="t")
    assert ReplyCache(cache.path, {"model": "other"}).get("p") is None


@pytest.mark.parametrize(
    "torn", [b'{"key": "a", "te', b"\xe4\xb8", b'{"key": "a"}\n{"key": "b", "te{"key": "c"}\n']
)
def test_a_file_of_torn_lines_alone_is_mended(tmp_path, torn):
    path = tmp_path / "replies.jsonl"
    path.write_bytes(torn)
    ReplyCache(path, {}).put("p", Reply(text="r"))
    assert ReplyCache(path, {}).get("p") == Reply(text="r")
    assert len(path.read_bytes().splitlines()) == 1


def test_null_counts_of_an_earlier_version_are_0_and_rows_of_another_shape_are_asked_again(tmp_path):
    cache = ReplyCache(tmp_path / "replies.jsonl", {})
    for prompt in ("null", "number", "text"):
        cache.put(prompt, Reply(text="r", num_input_tokens=3))
    null, number, text = map(json.loads, cache.path.read_text().splitlines())
    rows = [null | {"num_input_tokens": None}, number | {"text": 5}, text | {"num_output_tokens": "2"}]
    cache.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reopened = ReplyCache(cache.path, {})
    assert reopened.get("null") == Reply(text="r") and reopened.get("text") == Reply(
        text="r", num_input_tokens=3
    )
    assert reopened.get("number") is None


def test_empty_replies_of_an_earlier_version_are_asked_again(tmp_path):
    cache = ReplyCache(tmp_path / "replies.jsonl", {})
    cache.put("fine 1", Reply(text=""))
    with moody_server() as url:
        results = ask_all({"a": "fine 1"}, reach(url), cache, concurrency=1)
    assert results == {"a": Reply(text="1 enif", num_input_tokens=7, num_output_tokens=5)}
    assert ReplyCache(cache.path, {}).get("fine 1") == results["a"]


def test_a_server_that_says_nothing_stops_the_run(tmp_path):
    cache = ReplyCache(tmp_path / "replies.jsonl", {})
    with (
        moody_server() as url,
        pytest.raises(MissingEnvironmentError, match="20 times in a row: empty reply"),
    ):
        ask_all({str(i): f"mute {i}" for i in range(50)}, reach(url), cache, concurrency=1)


def test_as_a_generator_it_answers_each_prompt_in_order(tmp_path):
    cache = ReplyCache(tmp_path / "replies.jsonl", {})
    with moody_server() as url:
        generator = ServerGenerator(settings(url, max_retries=0), cache)
        found = generator.complete(["fine 1", "broken 1", "fine 1", "fine 2"], Decoding(max_new_tokens=5))
    fine = Reply(text="1 enif", num_input_tokens=7, num_output_tokens=5)
    other = Reply(text="2 enif", num_input_tokens=7, num_output_tokens=5)
    assert found == [[fine], [Failure(why="InternalServerError")], [fine], [other]]
