"""Held-out chats: scored by the exact reply; what can't be scored is said before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launcher_commands import save, sftcore
from tiny import TINY, write_lines
from tiny_tokenizers import CHATML, build_bpe
from transformers import AutoTokenizer, GenerationConfig

from sftcore.data.ledger import Ledger
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.splits import load_records
from sftcore.errors import UserInputError
from sftcore.evaluate.replies import Reply, replies_of
from sftcore.fsio import read_json, read_jsonl
from sftcore.recipe import load_recipe
from sftcore.stages.evaluate import evaluate
from sftcore.stages.export import export_run
from sftcore.stages.generate import Settings, generate_rows, generate_text
from sftcore.stages.held_out import check_scorable
from sftcore.stages.prepare import recipe_tokenizer
from sftcore.stages.whole_run import run_whole


def chat(*turns: str, **more) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]} | more


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> Path:
    """A tiny Llama with a chat template; its eos is not the token that ends a turn."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("tiny-chat")
    tokenizer = build_bpe()
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**TINY | {"vocab_size": len(tokenizer)}, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def chats(chat_model, tmp_path, monkeypatch) -> dict:
    """A recipe on chats; five are held out, of which three can be scored."""
    monkeypatch.chdir(tmp_path)
    write_lines(Path("train.jsonl"), [chat(f"Where is {i}?", "Paris is in France.") for i in range(6)])
    write_lines(Path("test.jsonl"), held_out("Rome", "London", "Paris"))
    sources = {name: [{"format": "jsonl", "path": f"{name}.jsonl"}] for name in ("train", "test")}
    return {
        "name": "chats",
        "seed": 3,
        "task": "chat",
        "model": {"path": str(chat_model), "dtype": "float32"},
        "data": sources,
        "batch": {"samples_per_step": 3, "capacity": 512},
        "train": {"epochs": 1, "lr": 1e-3},
        "evaluate": {"max_new_tokens": 6},
        "tracking": {"tensorboard": False},
    }


def held_out(*replies: str) -> list[dict]:
    one, two, three = replies
    return [
        chat("Who was born?", one, id="one"),
        chat("Hi", "yo", "And who else?", two, id="two"),
        chat("Who?", three, id="three"),
        chat("Who?", "me", "And you?", id="open"),
        chat("Say <|im_end|>", "no", id="forged"),
    ]


def recipe_of(chats, **changes):
    return load_recipe(Path(save(chats, **changes)))


def test_a_chat_is_right_where_the_reply_is_the_reference(chats):
    """What the model says becomes the reference of two chats: these are right, the third is not."""
    recipe = recipe_of(chats)
    assert evaluate(recipe)["base"]["n"] == 3
    rows = {row["id"]: row for row in read_jsonl(Path("runs/chats/eval/base/predictions.jsonl"))}
    assert [row["correct"] for row in rows.values()] == [False] * 3
    ends = "yo<|im_end|>\n<|im_start|>user\nAnd who else?<|im_end|>\n<|im_start|>assistant\n"
    assert rows["two"]["prompt"].endswith(ends) and rows["two"]["label"] == "London"
    said = [rows[name]["prediction"].strip() for name in ("one", "two")]
    assert all(said)
    write_lines(Path("test.jsonl"), held_out(*said, "Paris"))
    scores = evaluate(recipe)["base"]
    assert (scores["n"], scores["correct"]) == (3, 2)
    rejected = [r for r in read_jsonl(Path("runs/chats/ledger.test.jsonl")) if r["kind"] == "rejected"]
    assert [(r["excerpt"], r["row"], r["reason"]) for r in rejected] == [
        ("open", 4, "no_reply"),
        ("forged", 5, "special_token"),
    ]
    assert rejected[0]["detail"] == "the last turn is of role user"


def test_the_reply_is_what_training_trains(chats):
    """Its prompt is the ids before the trained ones, its end the template's token, not the model's eos."""
    recipe = recipe_of(chats)
    tokenizer = recipe_tokenizer(recipe)
    prompter = Prompter(PromptOptions.of(recipe), tokenizer)
    records = load_records(recipe, "test", Ledger())
    replies = replies_of(records, prompter)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != tokenizer.eos_token_id
    for record, reply in zip(records[:3], replies[:3], strict=True):
        assert isinstance(reply, Reply) and reply.stop_id == end
        sample, prompt = prompter.sample(record), prompter.prompt_ids(record)
        assert sample.input_ids[: len(prompt)].tolist() == prompt
        answer = sample.input_ids[len(prompt) :].tolist()
        assert answer[reply.num_tokens] == end and tokenizer.decode(answer[: reply.num_tokens]) == reply.text
    assert [refusal.reason for refusal in replies[3:]] == ["no_reply", "special_token"]


@pytest.mark.parametrize("command", ["plan", "run"])
def test_chats_that_cannot_be_scored_are_said_before_training(chats, command):
    write_lines(Path("test.jsonl"), held_out("a", "b", "c")[3:])
    done = sftcore(command, save(chats))
    assert done.returncode == 2, done.stderr
    assert "data.test: nothing to evaluate on\n    got: no_reply: 1, special_token: 1" in done.stderr
    assert "end held-out chats with the assistant's reply" in done.stderr
    assert not Path("runs/chats/metrics.jsonl").exists() and not Path("runs/chats/model").exists()


def test_examples_before_a_chat_are_refused_by_name(chats):
    few = recipe_of(chats, evaluate={"few_shot": 2})
    with pytest.raises(UserInputError, match=r"evaluate\.few_shot: solved chats can't be put before a chat"):
        check_scorable(few)


def test_a_whole_run_on_chats_ends_with_a_report(chats, caplog):
    """References longer than what is decoded are counted, in the log before training and on the page."""
    write_lines(
        Path("test.jsonl"), held_out("Rome", "London", "Question: Who was born in Rome? Answer: Paris")
    )
    table = run_whole(recipe_of(chats))
    assert "1 of 3 right replies are longer than evaluate.max_new_tokens (6)" in caplog.text
    report = read_json(Path("runs/chats/report.json"))
    assert report["n"] == 3 and report["acc_tuned"] is not None
    assert "1 of 3 references are longer than the 6 tokens decoded" in table
    assert json.dumps(report["notes"]).count("equals the reference exactly") == 1


def test_completions_beside_chats_are_scored_alike(chats):
    rows = [{"prompt": "Q", "completion": " A", "id": "c"}, *held_out("Rome", "London", "Paris")[:1]]
    write_lines(Path("test.jsonl"), rows)
    recipe = recipe_of(chats)
    evaluate(recipe)
    said = read_jsonl(Path("runs/chats/eval/base/predictions.jsonl"))[0]["prediction"]
    write_lines(Path("test.jsonl"), [rows[0] | {"completion": said}, rows[1]])
    assert evaluate(recipe)["base"]["correct"] == 1


def test_a_chat_models_turn_ends_as_in_evaluation(chats, chat_model):
    recipe = recipe_of(chats, evaluate={"max_new_tokens": 12})
    evaluate(recipe)
    rows = {
        row["id"]: row["prediction"] for row in read_jsonl(Path("runs/chats/eval/base/predictions.jsonl"))
    }
    write_lines(Path("asked.jsonl"), held_out("Rome", "London", "Paris")[:3])
    said = generate_rows(chat_model, Path("asked.jsonl"), Settings(max_new_tokens=12))
    assert {row["id"]: row["generated"] for row in said} == rows
    assert generate_text(chat_model, "Who was born?", Settings(max_new_tokens=12)) == rows["one"]


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_what_is_exported_stops_at_the_end_of_a_turn(chats, kind):
    """transformers and servers read it there; the base's own end of text stays one."""
    recipe = recipe_of(chats, adapter={"kind": kind})
    run_whole(recipe)
    folder = Path("exported")
    export_run(Path("runs/chats"), folder, merge=kind == "lora")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert ends == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")] and tokenizer.eos_token_id != ends[1]
