"""A chat template is somebody else's program: whatever it does, a chat is refused or rendered, and soon."""

from __future__ import annotations

import resource
import signal
import threading

import pytest
from tiny_tokenizers import build_bpe

from sftcore.data.bounded import TookTooMuch, bounded
from sftcore.data.chat_template import ChatRefused, ChatTemplate, choose_template
from sftcore.data.contents import Message
from sftcore.errors import UserInputError

GIGABYTE = 2**30
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def template(source: str) -> ChatTemplate:
    tokenizer = build_bpe()
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


def render(source: str) -> str:
    return template(source).render([Message(role="user", content="Hi")])


@pytest.fixture
def hurried(monkeypatch) -> None:
    """A tenth of a second of processor time instead of ten."""
    monkeypatch.setattr("sftcore.data.chat_template.bounded", lambda: bounded(0.1, GIGABYTE // 4))


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    "source", [LOOPS, "{{ ((range(99999) | list) * 200) | select('equalto', 'x') | list | length }}"]
)
def test_a_template_that_never_ends_is_ended(source):
    with pytest.raises(ChatRefused, match="takes too much: it does not end within 0.1 s"):
        render(source)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    "source", ["{{ 'a' * 10**10 }}", "{{ [messages] * 10**9 }}", "{{ '%0*d' % (10**9, 1) }}"]
)
def test_a_template_that_swells_is_ended(source):
    with pytest.raises(ChatRefused, match="takes too much: it needs over 268 MB"):
        render(source)
    assert render("{{ messages[0].content * 1000 }}") == "Hi" * 1000


@pytest.mark.parametrize(
    "source",
    [
        *("{{ 1 / 0 }}", "{{ none + 1 }}", "{{ 'a'.join(1) }}", "{{ (2.0) ** 99999 }}"),
        *("{{ '\u00e9'.encode('ascii') }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
        *("{{ 'a'|truncate(length=-1) }}", "{% if %}", "{{ 'x'.y.z }}", "{{ '\\ud800' }}"),
        *("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "{{ raise_exception('x' * 10**6) }}"),
        "{{ 'a' * 2**27 }}",
    ],
)
def test_whatever_a_template_raises_the_chat_is_refused_in_few_words(source):
    with pytest.raises(ChatRefused) as refused:
        render(source)
    assert 10 < len(str(refused.value)) < 500


@pytest.mark.usefixtures("hurried")
def test_the_third_chat_that_had_to_be_ended_is_the_last():
    looping = template("{% if messages[0].content == 'loop' %}" + LOOPS + "{% endif %}fine")
    for _ in range(2):
        with pytest.raises(ChatRefused):
            looping.render([Message(role="user", content="loop")])
    assert looping.render([Message(role="user", content="Hi")]) == "fine"
    with pytest.raises(UserInputError, match="3 chats took the chat template too much"):
        looping.render([Message(role="user", content="loop")])


def test_limits_and_signals_are_afterwards_what_they_were():
    def own(*_: object) -> None: ...

    earlier = signal.signal(signal.SIGVTALRM, own)
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with pytest.raises(TookTooMuch, match="0.05 s"), bounded(0.05):
            assert resource.getrlimit(resource.RLIMIT_AS) != before
            while True:
                pass
        assert signal.getsignal(signal.SIGVTALRM) is own
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
        assert resource.getrlimit(resource.RLIMIT_AS) == before
    finally:
        signal.signal(signal.SIGVTALRM, earlier)


def test_another_thread_has_its_memory_bounded():
    said: list[str] = []

    def work() -> None:
        try:
            with bounded(spare_bytes=GIGABYTE // 4):
                bytearray(GIGABYTE)
        except TookTooMuch as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == ["it needs over 268 MB of memory"]


def test_a_template_file_is_a_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for odd in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path), "a\0b", "x" * 5000):
        with pytest.raises(UserInputError, match="no such chat template"):
            choose_template(build_bpe(), odd)
