"""Keys of turns and rows are a white list: honoured, known to say nothing, or refused by name."""

from __future__ import annotations

import json

import pytest

from sftcore.data.contents import Chat, Completion, Message
from sftcore.data.ledger import Change, Reason, Rejection
from sftcore.data.prompts import Refusal

HI, YO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yo"}
SO, BYE = {"role": "user", "content": "so"}, {"role": "assistant", "content": "bye"}
UNTRAINED = [
    {"loss": False},
    {"masked": True},
    {"loss_mask": 0},
    {"trainable": False},
    {"loss_weight": 0.0},
    {"weight": 0},
    {"train": "false"},
    {"training": 0},
    {"is_masked": True, "loss": False},
]
IDLE = [
    {"loss": True},
    {"masked": False},
    {"weight": 1},
    {"weight": 1.0, "train": True},
    {"tool_calls": []},
    {"reasoning_content": ""},
    {"thinking": None},
    {"prefix": False},
    {"enabled": True},
    {"end_turn": True, "redacted": False, "split": "train_sft"},
]
REFUSED = [
    ("loss", 0.5),
    ("loss", "maybe"),
    ("mask", True),
    ("prefix", True),
    ("enabled", False),
    ("train_detail", [{"begin_offset": 0}]),
    ("tool_calls", [{"id": "1"}]),
    ("reasoning_content", "hm"),
    ("reasoning", "hm"),
    ("thinking", "hm"),
    ("name", "Ann"),
    ("importance", 0.2),
    ("lossy", 0),
    ("meta", {"train": False}),
    ("metadata", {"a": [{"loss": False}]}),
    ("metadata", '{"train": false}'),
    ("tags", ["no_train"]),
    ("end_turn", False),
    ("type", "thought"),
    ("state", "deleted"),
    ("redacted", True),
    ("reward", 0),
    ("split", "test"),
    ("n_x", "text"),
    ("doc_id", "You are a pirate."),
    ("num_turns_of", "two of them"),
]
ASKED = [  # what may be half of the task, next to a prompt
    ("source", "Hello"),
    ("src", "Hello"),
    ("page", "Once upon a time"),
    ("topic", "cats"),
    ("target_language", "German"),
    ("header", "You are a pirate"),
    ("task", "summarize"),
    ("type", "reject"),
    ("text", "What is to be summarized"),
    ("meta", {"system": "be rude"}),
    ("metadata", {"system_prompt": "be rude"}),
    ("metadata", '{"train": false}'),
    ("metadata", {"tags": ["no-train"]}),
    ("tags", ["x"]),
]


def trained(records):
    return [[turn.is_trained for turn in record.content.messages] for record in records]


@pytest.mark.parametrize("flags", UNTRAINED)
def test_every_spelling_of_no_loss_is_honoured(write, read, flags):
    records, rejections, _ = read("jsonl", write("c.jsonl", [{"messages": [HI, YO | flags, SO, BYE]}]))
    assert rejections == [] and trained(records) == [[True, False, True, True]]


def test_a_masked_turn_is_context(make_prompter, chatml, record_of):
    turns = [Message(**HI), Message(**YO, is_trained=False), Message(**SO), Message(**BYE)]
    sample = make_prompter(chatml, task="chat").sample(record_of(Chat(messages=tuple(turns))))
    assert chatml.decode([t for t in sample.labels if t >= 0]) == "bye<|im_end|>"
    assert "yo<|im_end|>" in chatml.decode(sample.input_ids)


@pytest.mark.parametrize("keys", IDLE)
def test_what_asks_for_nothing_costs_nothing(write, read, keys):
    records, rejections, ledger = read("jsonl", write("c.jsonl", [{"messages": [HI, YO | keys]}]))
    assert rejections == [] and trained(records) == [[True, True]] and not ledger.altered_by_reason


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_other_keys_of_a_turn_cost_the_row_and_are_named(write, read, key, value):
    rows = [{"messages": [HI, YO | {key: value}]}, {"messages": [HI, YO]}]
    records, (rejection,), ledger = read("jsonl", write("c.jsonl", rows))
    assert len(records) == 1 and rejection.reason is Reason.UNKNOWN_KEY and f"'{key}" in rejection.detail
    problem = ledger.problem(frozenset(Reason), num_rows=2, max_fraction=0.01)
    assert "unknown_key: 1" in problem.got and "columns: {ignore: [...]}" in problem.remedy


@pytest.mark.parametrize(
    ("turns", "detail"),
    [
        ([HI | {"loss": True}, YO], "a turn of role user with 'loss': it is never trained"),
        ([HI, YO | {"loss": True, "masked": True}], "'loss' and 'masked', which disagree"),
        ([HI, YO | {"loss": False}], "no assistant turn is to be trained"),
    ],
)
def test_flags_that_can_not_be_followed_are_refused(write, read, turns, detail):
    rows = [{"messages": turns}, {"messages": [HI | {"weight": 0}, YO]}]
    records, (rejection,), _ = read("jsonl", write("c.jsonl", rows))
    assert detail in rejection.detail and len(records) == 1


def test_parts_of_text_are_joined_and_others_refused_by_name(write, read):
    text = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you", "image": None}]
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    rows = [{"messages": [HI | {"content": content}, YO]} for content in (text, text[:1], image, ["Hi"])]
    records, rejections, ledger = read("jsonl", write("c.jsonl", rows))
    assert [record.content.messages[0].content for record in records] == ["Hi you", "Hi "]
    assert ledger.altered_by_reason == {Change.PARTS_JOINED: 1}
    assert [r.detail for r in rejections] == [
        "a part of 'content' of type 'image_url'; only text is read",
        "a part of 'content' of type 'str'; only text is read",
    ]


def test_a_system_text_next_to_the_turns_is_said_first(write, read):
    system = Message(role="system", content="Be kind.")
    rows = [
        {"messages": [HI, YO], "system": "Be kind."},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yo"}]}
        | {"system_prompt": "Be kind."},
        {"messages": [{"role": "system", "content": "Be kind."}, HI, YO], "system": "Be kind."},
        {"messages": [HI, YO], "system": ""},
    ]
    records, _, ledger = read("jsonl", write("c.jsonl", rows))
    said = [record.content.messages for record in records]
    assert said[0] == said[1] == said[2] == (system, Message(**HI), Message(**YO)) and len(said[3]) == 2
    assert ledger.altered_by_reason == {Change.SYSTEM_FROM_COLUMN: 2}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("history", [["a", "b"]]),
        ("images", ["a.png"]),
        ("videos", ["a.mp4"]),
        ("tools", '[{"name": "f"}]'),
        ("enable_thinking", False),
        ("chat_template_kwargs", {"x": 1}),
        ("persona", "You are a pirate."),
        ("instruction", "Be brief."),
        ("weight", 0.5),
        ("loss", False),
        ("whatever", "text"),
    ],
)
def test_what_a_row_says_beside_its_turns_is_never_dropped_in_silence(write, read, key, value):
    rows = [{"messages": [HI, YO], key: value}, {"prompt": "a", "completion": "b", key: value}]
    path = write("c.jsonl", [*rows, {"messages": [HI, YO]}])
    records, rejections, _ = read("jsonl", path)
    assert len(records) == 1 and {r.detail for r in rejections} == {f"a row with {key!r}, which is not read"}
    for ignore in ([key], ["*"]):
        records, rejections, _ = read("jsonl", path, columns={"ignore": ignore})
        assert len(records) == 3 and rejections == []


def test_meta_data_makes_no_row_unusable_and_is_counted(write, read):
    meta = {
        "prompt_id": "a1",
        "category": "x",
        "score_chosen": 9.5,
        "num_turns": 2,
        "metadata": {"annotator": {"age": 30}},
        "created_at": "2024-01-01 10:00:00",
        "chosen": [HI, YO],
    }
    silent = {"tools": "[]", "system": None, "history": [], "train": True, "split": "train"}
    beside = {"source": "web", "language": "English", "topic": "a b", "tags": ["x"], "text": "Hi yo"}
    turn = YO | {"timestamp": "2024-01-01", "turn_id": 7, "lang": "de", "model": "m"}
    rows = [
        {"messages": [HI, turn], **meta, **silent, **beside},
        {"prompt": "Hi", "completion": "yo", **meta, **silent, "text": "Hi yo"},
        {"messages": [HI, YO], **silent},
    ]
    records, rejections, ledger = read("jsonl", write("c.jsonl", rows))
    assert rejections == [] and ledger.altered_by_reason == {Change.COLUMN_LEFT_OUT: 3}
    details = [entry["detail"] for entry in ledger.entries()]
    assert details[0] == "of turns: timestamp, turn_id, lang, model"
    assert details[1] == ", ".join([*meta, *beside]) and details[2] == ", ".join(["text", *meta])
    assert isinstance(records[0].content, Chat)
    assert records[1].content == Completion(prompt="Hi", completion="yo")


@pytest.mark.parametrize(("key", "value"), ASKED)
def test_what_may_be_half_of_the_task_is_never_dropped(write, read, key, value):
    path = write("c.jsonl", [{"prompt": "Do it", "completion": "Hallo", key: value}, {"messages": [HI, YO]}])
    records, (rejection,), _ = read("jsonl", path)
    assert (
        len(records) == 1 and rejection.reason is Reason.UNKNOWN_KEY and repr(key)[1:-1] in rejection.detail
    )
    assert len(read("jsonl", path, columns={"ignore": [key]})[0]) == 2


def test_all_fields_that_are_not_read_are_named_with_their_turn_and_can_be_ignored(write, read):
    path = write(
        "c.jsonl", [{"messages": [HI, YO | {"name": "Ann", "state": "ok", "id": 1}]}, {"messages": [HI, YO]}]
    )
    _, (rejection,), _ = read("jsonl", path)
    assert rejection.detail == "turn 2: a turn with 'name', 'state', which are not read"
    assert rejection.excerpt == '{"name": "Ann", "state": "ok"}'
    records, rejections, ledger = read("jsonl", path, columns={"ignore": ["name", "state"]})
    assert len(records) == 2 and rejections == [] and ledger.altered_by_reason == {Change.COLUMN_LEFT_OUT: 1}


@pytest.mark.parametrize("columns", [{}, {"messages": "messages"}])
def test_turns_win_over_a_prompt_next_to_them(write, read, columns):
    rows = [{"prompt": "Hi", "prompt_id": "a1", "messages": [HI, YO]}]
    records, rejections, ledger = read("jsonl", write("c.jsonl", rows), columns=columns)
    assert rejections == [] and records[0].content == Chat(messages=(Message(**HI), Message(**YO)))
    assert ledger.altered_by_reason == {Change.COLUMN_LEFT_OUT: 1}


def test_row_numbers_that_pandas_writes_are_no_text(write, read):
    records, rejections, _ = read("jsonl", write("c.csv", ",prompt,completion\n0,a,b\nx,c,d\n"))
    assert [r.content.prompt for r in records] == ["a"]
    assert [r.detail for r in rejections] == ["a row with '', which is not read"]


def test_ids_of_a_column_or_none(write, read):
    rows = [{"id": "x", "key": "k1", "prompt": "a", "completion": "b"}] * 2
    path = write("c.jsonl", json.dumps(rows))
    for setting, ids in (("id", ["x", "x"]), ("key", ["k1", "k1"]), (None, ["c:1", "c:2"])):
        records, _, _ = read("jsonl", path, columns={"id": setting})
        assert [record.id for record in records] == ids


@pytest.mark.parametrize(
    ("token", "is_forged"), [("<|im_end|>", True), ("<|im_start|>", True), ("<fact>", False)]
)
def test_added_tokens_that_the_template_writes_are_forged_in_a_text(chatml, token, is_forged):
    from sftcore.data.prompts import Prompter, PromptOptions
    from sftcore.settings import MatchingSettings

    own = ("<|im_start|>", "<|im_end|>", "<fact>")
    options = PromptOptions(
        task="chat",
        templates={},
        matching=MatchingSettings(),
        max_length=512,
        overlength="reject",
        own_tokens=own,
    )
    answer = f"{token}yes{token} or no"
    chat = Chat(messages=(Message(**HI), Message(role="assistant", content=answer)))
    (found,) = Prompter(options, chatml, {}).encode_batch([chat])
    if is_forged:
        assert isinstance(found, Refusal) and found.reason is Reason.SPECIAL_TOKEN
    else:  # content, not the answer's end
        (start, end) = found.trained[0]
        assert chatml.decode(found.ids[start:end]) == answer + "<|im_end|>"


@pytest.mark.parametrize(("special", "role"), [(False, "assistant"), (True, "assistant"), (False, "user")])
def test_thoughts_whose_marks_are_added_tokens_are_an_answers_content(
    chatml, make_prompter, record_of, special, role
):
    """As in Qwen3 and DeepSeek-R1: the template writes `<think>`, an added token that is not special."""
    from tokenizers import AddedToken

    chatml.add_tokens([AddedToken(mark, special=special) for mark in ("<think>", "</think>")])
    chatml.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    said = "<think>\nHm.\n</think>\n\nyes"
    turns = [HI | {"content": said}, YO] if role == "user" else [HI, YO | {"content": said}]
    chat = Chat(messages=tuple(Message(**turn) for turn in turns))
    found = make_prompter(chatml, task="chat").sample(record_of(chat))
    if special or role == "user":
        assert isinstance(found, Rejection) and found.reason is Reason.SPECIAL_TOKEN
        return
    ids = [label for label in found.labels if label >= 0]
    assert chatml.decode(ids) == "Hm.\n</think>\n\nyes<|im_end|>"
    assert chatml.convert_tokens_to_ids("</think>") in ids


@pytest.mark.parametrize("turn", [1, 0])
def test_added_tokens_that_are_not_called_special_forge_a_turn_too(chatml, make_prompter, record_of, turn):
    from tokenizers import AddedToken

    chatml.add_tokens([AddedToken("<turn>", special=False), AddedToken("<noted>", special=False)])
    chatml.chat_template = (
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    prompter = make_prompter(chatml, task="chat")
    for said, is_forged in (("a<turn>user\nforged", True), ("a <noted> b", False)):
        turns = [HI, YO]
        turns[turn] = turns[turn] | {"content": said}
        found = prompter.sample(record_of(Chat(messages=tuple(Message(**t) for t in turns))))
        assert (isinstance(found, Rejection) and found.reason is Reason.SPECIAL_TOKEN) == is_forged
