"""Templates that write earlier answers otherwise than the last, or whose generation prompt opens a thought.

Each has the structure of a published one: gpt-oss, Qwen3, Qwen3-Thinking, DeepSeek-R1 distilled, QwQ.
"""

from __future__ import annotations

from datetime import date

import pytest
from tiny_tokenizers import build_bpe

from sftcore.data.chat import ChatRefused, ChatRenderer, last_answer_only
from sftcore.data.contents import Chat, Message
from sftcore.data.seam import Draft, encode_drafts
from sftcore.data.tokens import codec_of
from sftcore.errors import UserInputError

TOKENS = "<|start|> <|message|> <|channel|> <|end|> <|return|> <|bos|> <|eos|> <|User|> <|Assistant|>".split()
GPT_OSS = (
    "<|start|>system<|message|>You are a model.\nToday: {{ strftime_now('%Y-%m-%d') }}<|end|>"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
QWEN3 = (  # thoughts stay in answers behind the last question; the last answer has one, empty or not
    "{% set ns = namespace(last=messages|length - 1, search=true) %}{% for m in messages[::-1] %}"
    "{% if ns.search and m.role == 'user' %}"
    "{% set ns.search = false %}{% set ns.last = messages|length - 1 - loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role != 'assistant' %}{{ m.content }}{% else %}"
    "{% set said, thought = m.content, '' %}{% if '</think>' in m.content %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% endif %}{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}"
    "{% else %}{{ said }}{% endif %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3_THINKING = QWEN3.replace(
    "'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif"
)
R1 = (  # of no answer the thought is kept, and the generation prompt opens one
    "<|bos|>{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|eos|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
VERBATIM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|eos|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n<think>\n' }}{% endif %}"
)
SILENT = R1.replace("'<|Assistant|><think>\n'", "'<|Assistant|>'")  # DeepSeek-R1 as first published
ALL = {
    "gpt-oss": GPT_OSS,
    "qwen3": QWEN3,
    "thinking": QWEN3_THINKING,
    "r1": R1,
    "verbatim": VERBATIM,
    "silent": SILENT,
}
ANSWER = "<think>\nIt is 4.\n</think>\n\nFour."


def renderer(name):
    tokenizer = build_bpe()
    tokenizer.add_tokens([*TOKENS, "<|user|>", "<|assistant|>"], special_tokens=True)
    tokenizer.chat_template = ALL[name]
    return ChatRenderer(codec_of(tokenizer), date(2025, 1, 2))


def chat(*contents, trained="all"):
    roles = ("user", "assistant") * len(contents)
    turns = [Message(role=role, content=said) for role, said in zip(roles, contents, strict=False)]
    whole = Chat(messages=tuple(turns))
    return whole if trained == "all" else last_answer_only(whole)


@pytest.mark.parametrize(
    ("name", "last", "fed", "written"),
    [
        ("gpt-oss", "Four.", "<|start|>assistant", "<|channel|>final<|message|>Four.<|return|>"),
        ("qwen3", ANSWER, "<|im_start|>assistant\n", f"{ANSWER}<|im_end|>"),
        ("qwen3", "Four.", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "Four.<|im_end|>"),
        ("thinking", ANSWER, "assistant\n<think>\n", "It is 4.\n</think>\n\nFour.<|im_end|>"),
        ("thinking", "Four.", "assistant\n<think>\n", "\n</think>\n\nFour.<|im_end|>"),
        ("r1", ANSWER, "<|Assistant|><think>\n", "It is 4.\n</think>\n\nFour.<|eos|>"),
        ("verbatim", ANSWER, "<|assistant|>\n<think>\n", "It is 4.\n</think>\n\nFour.<|eos|>"),
        ("silent", ANSWER, "<|Assistant|>", f"{ANSWER}<|eos|>"),
    ],
)
@pytest.mark.parametrize("earlier", ["Two.", "<think>\nHm.\n</think>\n\nTwo."])
def test_the_last_answer_follows_exactly_what_inference_feeds(name, last, fed, written, earlier):
    render = renderer(name)
    said = chat("1+1?", earlier, "2+2?", last, trained="last")
    pieces = render.pieces(said)
    assert len(pieces) == 2 and pieces[1] == written
    assert pieces[0].startswith(render.prompt(said)) and pieces[0].endswith(fed)
    assert "Two." in pieces[0] and "2+2?" in pieces[0]
    (encoded,) = encode_drafts(render.codec, [Draft(pieces=pieces, is_bare=False)])
    prompt = render.codec.encode([pieces[0]])[0]
    assert encoded.ids[: encoded.num_prompt] == prompt
    assert render.codec.tokenizer.decode(encoded.ids[encoded.num_prompt :]) == written


@pytest.mark.parametrize("name", ["gpt-oss", "thinking", "r1", "silent"])
def test_what_follows_the_last_trained_answer_is_not_there_when_that_is_written(name):
    render = renderer(name)
    turns = list(chat("1+1?", ANSWER, "2+2?", "Five.").messages)
    turns[-1] = Message(role="assistant", content="Five.", is_trained=False)
    assert render.pieces(Chat(messages=tuple(turns))) == render.pieces(chat("1+1?", ANSWER))


@pytest.mark.parametrize(
    ("name", "earlier", "last"),
    [
        ("gpt-oss", "Two.", "Four."),
        ("qwen3", ANSWER, "Four."),
        ("thinking", "Two.", "Four."),
        ("thinking", ANSWER, ANSWER),
        ("r1", ANSWER, ANSWER),
        ("r1", "Two.", ANSWER),
        ("silent", ANSWER, ANSWER),
    ],
)
def test_an_earlier_answer_that_is_written_otherwise_is_refused_with_the_remedy_that_works(
    name, earlier, last
):
    render = renderer(name)
    with pytest.raises(ChatRefused, match="data.train_answers: last, or `loss: false`"):
        render.pieces(chat("1+1?", earlier, "2+2?", last))
    assert len(render.pieces(chat("1+1?", earlier, "2+2?", last, trained="last"))) == 2


def test_earlier_answers_that_stay_as_they_were_written_are_trained_too():
    """The generation prompt opens each of them, and the template keeps them to the last character."""
    pieces = renderer("verbatim").pieces(chat("1+1?", ANSWER, "2+2?", ANSWER))
    rest = "It is 4.\n</think>\n\nFour.<|eos|>"
    assert pieces[1::2] == (rest, rest)
    assert pieces[2] == "\n<|user|>\n2+2?<|eos|>\n<|assistant|>\n<think>\n"


@pytest.mark.parametrize("name", ["r1", "verbatim"])
@pytest.mark.parametrize("answer", ["Four.", "<think>It is 4.</think>Four.", "\n<think>\nHm.</think>Four."])
def test_an_answer_that_goes_on_otherwise_than_the_generation_prompt_is_refused(name, answer):
    with pytest.raises(
        ChatRefused, match=r"opens turn 2 with '<think>\\n', and this answer begins otherwise"
    ):
        renderer(name).pieces(chat("2+2?", answer))


def test_a_thought_that_the_template_writes_otherwise_is_refused_and_shown():
    with pytest.raises(ChatRefused, match=r"writes <think>\\nIt is 4.\\n</think>\\n\\nFour."):
        renderer("qwen3").pieces(chat("2+2?", "<think>It is 4.</think>Four."))


@pytest.mark.parametrize("name", ["thinking", "r1", "verbatim"])
def test_a_turn_that_the_template_skips_costs_the_row_there_too(name):
    render = renderer(name)
    skips = "{% for m in messages if m.role != 'tool' %}".join(ALL[name].rsplit("{% for m in messages %}", 1))
    tokenizer = render.codec.tokenizer
    tokenizer.chat_template = skips
    turns = chat("1+1?", ANSWER, "2+2?", ANSWER, trained="last").messages
    with_tool = Chat(messages=(*turns[:2], Message(role="tool", content="user"), *turns[2:]))
    skipping = ChatRenderer(render.codec, date(2025, 1, 2))
    assert skipping.pieces(Chat(messages=turns)) == render.pieces(Chat(messages=turns))
    with pytest.raises(ChatRefused, match="turn 3, of role tool, is not in the rendered text"):
        skipping.pieces(with_tool)


def test_blocks_are_followed_or_refused():
    marked = VERBATIM.replace("{{ '<|' + m.role", "{% generation %}{{ '<|' + m.role", 1)
    marked = marked.replace("'<|eos|>\n' }}", "'<|eos|>\n' }}{% endgeneration %}", 1)
    tokenizer = renderer("verbatim").codec.tokenizer
    tokenizer.chat_template = marked
    with pytest.raises(UserInputError, match="can't be trained on"):
        ChatRenderer(codec_of(tokenizer))
