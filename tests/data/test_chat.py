"""Assistant turns are found in any template that can be verified; the others are refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, build_bpe

from sftcore.data.chat import ChatRefused, ChatRenderer
from sftcore.data.contents import Chat, Message
from sftcore.data.tokens import codec_of
from sftcore.errors import UserInputError

CONTENTS = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
    str.strip
)
MASKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # like Qwen3's: an empty thought before the last answer only
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} <|im_end|>{% endif %}{% endfor %}"
)


def renderer(template):
    tokenizer = build_bpe()
    tokenizer.chat_template = template
    return ChatRenderer(codec_of(tokenizer))


def chat(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    turns = [Message(role=r, content=c) for r, c in zip(roles, contents, strict=False)]
    return Chat(messages=(*([Message(role="system", content=system)] if system else []), *turns))


def test_pieces_of_a_template_that_adds_a_system_turn():
    assert renderer(CHATML).pieces(chat("hi", " yo ", "so", "bye")) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        " yo <|im_end|>",
        "\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n",
        "bye<|im_end|>",
    )


@pytest.mark.parametrize("template", [CHATML, MASKED])
def test_samples_do_not_depend_on_the_day(template):
    """As in Llama 3's templates; one that asks the clock whatever it is given is refused."""
    llama = "{% if not date_string is defined %}{% set date_string = strftime_now('%f') %}{% endif %}"
    assert (
        renderer(llama + "{{ date_string }}\n" + template)
        .pieces(chat("hi", "yo"))[0]
        .startswith("26 Jul 2024\n")
    )
    with pytest.raises(UserInputError, match="reads the clock"):
        renderer("{{ strftime_now('%f') }}\n" + template)


def test_a_conversation_that_ends_with_a_user_turn_keeps_no_tail():
    pieces = renderer(CHATML).pieces(chat("hi", "yo", "more"))
    assert pieces[-1] == "yo<|im_end|>" and len(pieces) == 2


def test_generation_blocks_are_used_and_extended_to_the_end_of_turn():
    assert renderer(MASKED).pieces(chat("hi", "yo 北京", "so", " bye")) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "yo 北京<|im_end|>",
        "\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n",
        " bye<|im_end|>",
    )


def test_end_of_turn_inside_a_generation_block():
    inside = MASKED.replace("{% endgeneration %}<|im_end|>", "<|im_end|>{% endgeneration %}")
    assert renderer(inside).pieces(chat("hi", "yo")) == renderer(MASKED).pieces(chat("hi", "yo"))


def test_what_the_template_writes_before_the_last_answer_only_is_context():
    """Else one answer in n would train an empty thought; in a chat of one answer it is the same."""
    pieces = renderer(THINKING).pieces(chat("hi", "yo", "so", "bye"))
    assert pieces[1] == "yo<|im_end|>" and pieces[3] == "bye<|im_end|>"
    assert pieces[2].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert renderer(THINKING).pieces(chat("hi", "yo"))[1] == "yo<|im_end|>"


def test_what_the_template_writes_before_every_answer_is_trained():
    final = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}final: {% endif %}{{ m.content }}"
    )
    assert renderer(final).pieces(chat("hi", "yo", "so", "bye"))[1::2] == (
        "final: yo<|im_end|>",
        "final: bye<|im_end|>",
    )


def test_space_around_a_turn_is_trained():
    assert renderer(LLAMA2).pieces(chat("hi", "yo")) == ("<|im_start|>[INST] hi [/INST]", " yo <|im_end|>")


@pytest.mark.parametrize("template", [CHATML, MASKED, THINKING, LLAMA2])
@settings(deadline=None)
@given(st.lists(CONTENTS, min_size=2, max_size=6))
def test_pieces_are_what_inference_feeds_and_what_it_should_write(template, contents):
    render, conversation = renderer(template), chat(*contents)
    pieces = render.pieces(conversation)
    answers = contents[1::2]
    assert len(pieces) == 2 * len(answers)
    assert all(
        a.strip() in p and p.endswith("<|im_end|>") for a, p in zip(answers, pieces[1::2], strict=True)
    )
    assert "".join(pieces[:-1]).startswith(render.prompt(conversation))
    if template is not THINKING:
        assert "".join(pieces[:-1]) == render.prompt(conversation)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            "no end-of-turn token follows",
        ),
        (
            CHATML.replace("assistant\n{% endif %}", "bot\n{% endif %}"),
            "not a prefix of the whole conversation",
        ),
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "not in the rendered text"),
        (
            "{% for m in messages if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endfor %}",
            "turn 1, of role user, is not in the rendered text",
        ),
        ("{{ raise_exception('no chats today') }}", "the template says: no chats today"),
        (
            MASKED.replace("{% endgeneration %}<|im_end|>", "{% endgeneration %}"),
            "no end-of-turn token follows",
        ),
        (
            MASKED.replace("{% generation %}{{ m.content }}", "{{ m.content }}{% generation %}"),
            "marks no turn of this chat",
        ),
        (
            MASKED.replace("{% generation %}{{ m.content }}", "So: {% generation %}{{ m.content }}"),
            "don't start where the generation prompt ends",
        ),
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", None),
    ],
)
def test_templates_that_cannot_be_verified_are_refused(template, message):
    if message is None:  # bare, but verifiable: each turn follows what came before and ends with its token
        assert renderer(template).pieces(chat("hi", "yo")) == ("hi<|im_end|>", "yo<|im_end|>")
        return
    with pytest.raises(UserInputError, match="can't be trained on") as caught:
        renderer(template)
    assert message in str(caught.value) and "fix the template" in str(caught.value)


def test_no_chat_template_is_refused(bpe):
    with pytest.raises(UserInputError, match="no chat template(.|\n)*give `prompt` and `completion`"):
        ChatRenderer(codec_of(bpe))


def test_one_conversation_can_be_refused():
    strict = "{% if messages|length > 4 %}{{ raise_exception('too many') }}{% endif %}" + CHATML
    with pytest.raises(ChatRefused, match="too many"):
        renderer(strict).pieces(chat("a", "b", "c", "d", "e", "f"))


def test_a_template_that_forgets_early_turns_is_refused():
    """Of all but the last turns nothing is left, which would train on half a conversation."""
    window = CHATML.replace("in messages %}", "in messages[-4:] %}")
    with pytest.raises(ChatRefused, match="turn 1, of role user, is not in"):
        renderer(window).pieces(chat("a", "b", "c", "d", "e", "f"))
