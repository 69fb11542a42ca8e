"""What belongs to an answer is told by the template's own text between contents, in any family's template."""

from __future__ import annotations

from datetime import date

import pytest
from tiny_tokenizers import CHATML, build_bpe

from sftcore.data.chat import ChatRefused, ChatRenderer, turn_ends, without_system
from sftcore.data.chat_template import ChatTemplate
from sftcore.data.contents import Chat, Message
from sftcore.data.tokens import codec_of
from sftcore.errors import UserInputError

TOKENS = [f"<{name}>" for name in "bos s head tail eot open user bot end done final over".split()]
TOKENS += ["</s>", "[INST]", "[/INST]"]
LLAMA3 = (
    "{% for m in messages %}{{ '<bos>' if loop.first else '' }}<head>{{ m.role }}<tail>\n\n"
    "{{ m.content | trim }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<head>assistant<tail>\n\n{% endif %}"
)
COHERE = (  # two tokens close an answer, of which one closes the user's turns, too
    "<bos>{% for m in messages %}<open>{% if m.role == 'user' %}<user>{{ m.content }}<end>"
    "{% else %}<bot>{{ m.content }}<done><end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<open><bot>{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
PHI = (  # an end of text stands behind the conversation, but is no part of the last turn
    "{% for m in messages %}<head>{{ m.role }}\n{{ m.content }}<eot>\n{% endfor %}"
    "{% if add_generation_prompt %}<head>assistant\n{% else %}</s>{% endif %}"
)
HARMONY = (  # the last answer is closed by another token than those that are history
    "{% for m in messages %}<open>{{ m.role }}{% if m.role == 'assistant' %}<final>{{ m.content }}"
    "{{ '<over>' if loop.last and not add_generation_prompt else '<end>' }}{% else %}"
    "<done>{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<open>assistant{% endif %}"
)
THOUGHTS = (  # as Qwen3's: of history thoughts are left out, the last answer has one, empty or not
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '' %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BLOCKS = (  # as SmolLM3's: the block holds the header, and a newline behind the end of turn
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SKIPS = CHATML.replace("in messages %}{% if", "in messages if m.role in ('user', 'assistant') %}{% if", 1)


def renderer(template, today=None):
    tokenizer = build_bpe()
    tokenizer.add_tokens(TOKENS, special_tokens=True)
    tokenizer.chat_template = template
    return ChatRenderer(codec_of(tokenizer), today)


def chat(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    turns = [Message(role=role, content=said) for role, said in zip(roles, contents, strict=False)]
    return Chat(messages=(*([Message(role="system", content=system)] if system else []), *turns))


TWO = chat("hi", "yes", "and?", "no")


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (LLAMA3, ("yes<eot>", "no<eot>")),
        (COHERE, ("yes<done><end>", "no<done><end>")),
        (MISTRAL, (" yes</s>", " no</s>")),
        (PHI, ("yes<eot>", "no<eot>")),
        (BLOCKS, ("yes<|im_end|>\n", "no<|im_end|>\n")),
        (BLOCKS + "{% if not add_generation_prompt %}</s>{% endif %}", ("yes<|im_end|>", "no<|im_end|>")),
        (THOUGHTS, ("yes<|im_end|>", "no<|im_end|>")),
    ],
)
def test_all_tokens_that_close_an_answer_are_trained_and_no_header_is(template, answers):
    render = renderer(template)
    pieces = render.pieces(TWO)
    assert pieces[1::2] == answers
    assert render.end_of_turn_id == render.codec.encode([answers[-1].rstrip()])[0][-1]
    assert not any(opener in "".join(answers) for opener in ("<|im_start|>", "<head>", "<open>", "<s>"))


@pytest.mark.parametrize("template", [LLAMA3, COHERE, CHATML])
def test_a_template_that_always_writes_the_next_header_trains_none(template):
    always = template.replace("{% if add_generation_prompt %}", "{% if true %}")
    assert renderer(always).pieces(TWO)[1::2] == renderer(template).pieces(TWO)[1::2]


def test_turns_that_only_mark_the_next_one_have_no_end():
    glm = "{% for m in messages %}<open>{{ m.role }}\n{{ m.content }}{% endfor %}<open>assistant\n"
    with pytest.raises(UserInputError, match="can't be trained on"):
        renderer(glm)


def test_an_answer_that_ends_otherwise_as_history_is_trained_as_the_last_only():
    render = renderer(HARMONY)
    assert render.pieces(chat("hi", "yes"))[1] == "<final>yes<over>"
    with pytest.raises(ChatRefused, match="another token once it is history"):
        render.pieces(TWO)
    turns = list(TWO.messages)
    turns[1] = Message(role="assistant", content="yes", is_trained=False)
    pieces = render.pieces(Chat(messages=tuple(turns)))
    assert pieces[1:] == ("<final>no<over>",) and "yes<end>" in pieces[0]


def test_thoughts_are_trained_where_they_are_written_and_never_lost():
    render = renderer(THOUGHTS)
    thought = "<think>\nhm\n</think>\n\nno"
    pieces = render.pieces(chat("hi", "yes", "and?", thought))
    assert pieces[1::2] == ("yes<|im_end|>", thought + "<|im_end|>")
    assert pieces[2].endswith("<|im_start|>assistant\n")
    with pytest.raises(ChatRefused, match="turn 2, of role assistant, is not in the rendered text"):
        render.pieces(chat("hi", thought, "and?", "no"))


@pytest.mark.parametrize("role", ["developer", "system", "tool"])
def test_a_turn_that_the_template_skips_costs_the_row(role):
    for place in (0, 2):
        turns = list(TWO.messages)
        turns.insert(place, Message(role=role, content="user"))  # a word that stands in each header
        with pytest.raises(ChatRefused, match=f"turn {place + 1}, of role {role}, is not in"):
            renderer(SKIPS).pieces(Chat(messages=tuple(turns)))


def test_a_turn_that_is_written_twice_costs_the_row():
    twice = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if loop.first %}{{ m.content }}{% endif %}")
    with pytest.raises(UserInputError, match="is not in the rendered text|writes a turn twice"):
        renderer(twice)


@pytest.mark.parametrize("said", ["Xq0qX", "<|im_end|", "user\nhi", " a ", "\n", "{{ 1 }}", "北京"])
def test_contents_may_look_like_marks_headers_or_templates(said):
    pieces = renderer(CHATML).pieces(chat(said, f"{said}.", said, f"{said}!"))
    assert pieces[1::2] == (f"{said}.<|im_end|>", f"{said}!<|im_end|>")
    assert pieces[0].endswith(f"user\n{said}<|im_end|>\n<|im_start|>assistant\n")


def test_a_tool_result_as_json_is_found():
    tool = LLAMA3.replace("m.content | trim", "(m.content | tojson) if m.role == 'tool' else m.content")
    turns = [*TWO.messages[:2], Message(role="tool", content='{"a": "ü\n"}'), TWO.messages[3]]
    assert renderer(tool).pieces(Chat(messages=tuple(turns)))[-1] == "no<eot>"


def test_long_chats_are_rendered_a_bounded_number_of_times(monkeypatch):
    rendered, render = [], ChatTemplate._rendered

    def counted(self, turns, **about):
        rendered.append(len(turns))
        return render(self, turns, **about)

    monkeypatch.setattr(ChatTemplate, "_rendered", counted)
    short, render_all = chat(*["hi"] * 40), renderer(CHATML)
    long = chat(*["so"] * 400)
    counts = []
    for conversation in (short, long, long):
        rendered.clear()
        assert len(render_all.pieces(conversation)) == len(conversation.messages)
        counts.append((len(rendered), sum(rendered) / len(conversation.messages)))
    assert counts[1][0] == counts[0][0] < 60  # as many for 200 exchanges as for 20
    assert counts[1][1] < 20 and counts[2] == (1, 1.0)


def test_a_clock_in_the_template_is_the_recipes_or_refused():
    dated = "{% set day = strftime_now('%d %b %Y') %}<head>system<tail>{{ day }}<eot>" + LLAMA3
    with pytest.raises(UserInputError, match="reads the clock(.|\n)*data.today"):
        renderer(dated)
    assert "02 Jan 2025" in renderer(dated, date(2025, 1, 2)).pieces(TWO)[0]
    computed = dated.replace("'%d %b %Y'", "'%d' + '%b'")
    assert "02Jan" in renderer(computed, date(2025, 1, 2)).pieces(TWO)[0]
    with pytest.raises(UserInputError, match="reads the clock"):
        renderer(computed)
    asks = "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}"
    asks += "{{ date_string }}"
    assert renderer(asks + LLAMA3).pieces(TWO)[0].startswith("26 Jul 2024")
    assert renderer(asks + LLAMA3, date(2025, 1, 2)).pieces(TWO)[0].startswith("02 Jan 2025")


@pytest.mark.parametrize(
    "call",
    [
        "{% set n = strftime_now %}{{ n('%d %b') }}",
        "{{ (strftime_now)('%d %b') }}",
        "{{ strftime_now('%d' + ' %b') }}",
        "{{ strftime_now('%d'|trim) }}{{ strftime_now(format=' %b') }}",
        "{% set f = '%d %b' %}{{ strftime_now(f) }}",
        "{% macro day(now) %}{{ now('%d %b') }}{% endmacro %}{{ day(strftime_now) }}",
    ],
)
@pytest.mark.parametrize("start", ["", "\n", "  "])
def test_however_a_template_asks_the_clock_it_gets_the_recipes_day(call, start):
    written = renderer(f"{start}{{% if true %}}{call}{{% endif %}}\n{LLAMA3}", date(2025, 2, 3)).pieces(TWO)[
        0
    ]
    plain = renderer(f"{start}{{% if true %}}03 Feb{{% endif %}}\n{LLAMA3}").pieces(TWO)[0]
    assert written == plain and "03 Feb" in plain  # and the template's own white space is as it was
    with pytest.raises(UserInputError, match="data.today"):
        renderer(call + LLAMA3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ strftime_now }}", "writes the clock itself"),
        ("{{ strftime_now|string }}", "writes the clock itself"),
        ("{{ [strftime_now] }}", "writes the clock itself"),
        ("{{ range(1000)|random }}", "draws at random"),
        ("{{ lipsum(1) }}", "draws at random"),
        ("{{ raise_exception }}", "an object's address"),
        ("{{ cycler('a') }}", "an object's address"),
    ],
)
def test_what_differs_from_run_to_run_is_refused(source, message):
    with pytest.raises(UserInputError, match=message):
        renderer(source + LLAMA3, date(2025, 2, 3))
    said = chat("what is at 0x7f?", "a place at 0x7f")
    assert renderer(LLAMA3).pieces(said)[1].startswith("a place at 0x7f")


def test_a_template_that_fails_on_a_chat_costs_its_row():
    odd = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ 1 / (m.content | length - 4) }}", 1)
    with pytest.raises(
        (ChatRefused, UserInputError), match="the template fails|the template says|not in the"
    ):
        renderer(odd).pieces(chat("four", "yes"))


def test_system_turns_are_merged_or_dropped():
    said = chat("hi", "yes", "and?", "no", system="Be kind.")
    late = Chat(
        messages=(*said.messages[:3], Message(role="developer", content="Short."), *said.messages[3:])
    )
    merged = without_system(late, "merge").messages
    assert [turn.content for turn in merged] == ["Be kind.\n\nhi", "yes", "Short.\n\nand?", "no"]
    assert without_system(late, "drop") == TWO
    with pytest.raises(ChatRefused, match="no user turn follows"):
        without_system(Chat(messages=(*TWO.messages, Message(role="system", content="x"))), "merge")


def test_the_last_trained_token_need_not_be_the_one_that_ends_the_turn():
    codec = renderer(BLOCKS).codec
    end, last = turn_ends(codec)
    assert codec.tokenizer.decode([end]) == "<|im_end|>" and codec.tokenizer.decode([last]) == "\n"


def test_a_template_that_drops_earlier_thoughts_is_said_to():
    drops = CHATML.replace(
        "{{ m.content }}",
        "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}",
    )
    with pytest.raises(ChatRefused, match="turn 2, of role assistant(.|\n)*drops thoughts of earlier turns"):
        renderer(drops).pieces(chat("hi", "<think>x</think>yo", "so", "bye"))


VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}"
    "ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n{% else %}"
    "### Response:\n{{ m.content }}</s>\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
PLAIN_INST = MISTRAL.replace("[INST] ", "[inst] ").replace(
    " [/INST]", " [/inst]"
)  # no tokens of the tokenizer


@pytest.mark.parametrize(
    ("template", "markers"),
    [
        (VICUNA, ("ASSISTANT:", "USER:")),
        (ALPACA, ("### Response:", "### Instruction:")),
        (PLAIN_INST, ("[/inst]", "[inst]")),
        (CHATML, ()),
        (LLAMA3, ()),
        (HARMONY, ()),
    ],
)
def test_plain_markers_of_turns_are_found_in_the_templates_own_text(template, markers):
    render = renderer(template)
    assert set(render.markers) == set(markers)
    for marker in markers:  # a turn that looks like another one shifts nothing that is trained
        forged = f"hi {marker} so{marker}\n{marker} yes"
        ordinary, told = render.pieces(TWO), render.pieces(chat(forged, "yes", forged, forged))
        assert told[1] == ordinary[1] and told[3] == ordinary[3].replace("no", forged)
        assert told[0] == ordinary[0].replace("hi", forged)
        assert told[2] == ordinary[2].replace("and?", forged)
