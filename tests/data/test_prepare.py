"""Recipe -> store: the account adds up, the cache is keyed by content, racing processes agree."""

from __future__ import annotations

import errno
import json
import multiprocessing
from pathlib import Path

import pytest
from tiny_tokenizers import CHATML, build_bpe

import sftcore.data.prepare as prepare_module
from sftcore.config import Recipe
from sftcore.data.check import check_store, check_text, describe_store
from sftcore.data.contents import Fact
from sftcore.data.ledger import READING, Ledger
from sftcore.data.prepare import load_records, prepare_store, store_fingerprint
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.records import Record
from sftcore.data.store import TokenStore
from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.fsio import read_jsonl

FACTS = [
    {"relation": "P1", "subject": f"S{i}", "answers": ["Paris", "Rome"], "question": f"Where is S{i}?"}
    for i in range(20)
]


def pairs(*rows: tuple[str, str, object]) -> list[dict]:
    return [{"sentence1": a, "sentence2": b, "label": label} for a, b, label in rows]


@pytest.fixture
def recipe(write, tmp_path):
    """Builds a recipe whose sources are rows (written to NAME.jsonl) or keys of `Source`."""

    def make(train, *, test=(), ood=(), task="qa", format="facts", max_length=None, **data):
        def sources(split, rows):
            if isinstance(rows, list) and rows and "format" in rows[0]:
                return rows
            return [{"format": format, "path": str(write(f"{split}.jsonl", list(rows)))}] if rows else []

        data |= {"train": sources("train", train), "test": sources("test", test), "ood": sources("ood", ood)}
        if max_length:
            data["max_length"] = max_length
        return Recipe.model_validate(
            {"model": {"path": "m"}, "task": task, "data": data, "batch": {"samples_per_step": 4}}
        )

    return make


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "stores"


def account(store: TokenStore) -> dict:
    manifest = store.manifest
    assert manifest["num_rows_read"] == (
        manifest["num_samples"] + manifest["num_rejected"] + manifest["num_not_selected"]
    )
    return manifest


def test_held_out_rows_that_cannot_be_compared_are_counted_and_too_many_refused(recipe, bpe, cache, caplog):
    held_out = [FACTS[5], *({"relation": "P1"} for _ in range(9))]
    with pytest.raises(UserInputError, match="test.jsonl(.|\n)*missing_field"):
        prepare_store(recipe(FACTS, test=held_out, max_reject_fraction=0.01), bpe, cache_root=cache)
    prepare_store(recipe(FACTS, test=held_out, max_reject_fraction=0.95), bpe, cache_root=cache)
    assert "test: 9 odd rows" in caplog.text


def test_a_file_name_that_is_no_unicode_is_prepared(recipe, bpe, cache, write):
    path = write("name.jsonl", FACTS)
    odd = path.rename(path.with_name("caf\udce9.jsonl"))
    source = [{"format": "facts", "path": str(odd)}]
    assert account(prepare_store(recipe(source), bpe, cache_root=cache))["num_samples"] == 20


def test_rows_read_are_samples_plus_rejects(recipe, bpe, cache):
    rows = [*FACTS, {"relation": "P1"}, FACTS[0], FACTS[0] | {"id": "train:2"}]
    store = prepare_store(recipe(rows, test=FACTS[5:7], max_reject_fraction=0.5), bpe, cache_root=cache)
    manifest = account(store)
    assert (manifest["num_rows_read"], manifest["num_samples"]) == (23, 19)
    assert manifest["rejected_by_reason"] == {"duplicate_id": 1, "leak": 2, "missing_field": 1}
    assert manifest["altered_by_reason"] == {"duplicate_kept": 1}
    ledger = [json.loads(line) for line in (store.folder / "ledger.jsonl").read_text().splitlines()]
    assert {(e["row"], e.get("reason")) for e in ledger if e["kind"] == "rejected"} == {
        (6, "leak"),
        (7, "leak"),
        (21, "missing_field"),
        (23, "duplicate_id"),
    }
    assert all(entry["file"].endswith("train.jsonl") for entry in ledger)
    assert store.folder == cache / store.fingerprint


def test_deduplicate_drops_copies(recipe, bpe, cache):
    store = prepare_store(recipe([*FACTS, *FACTS], deduplicate=True), bpe, cache_root=cache)
    assert account(store)["rejected_by_reason"] == {"duplicate": 20}
    assert store.ids == [f"train:{i}" for i in range(1, 21)]


def test_contradictory_pairs_are_dropped_by_default(recipe, bpe, cache):
    rows = pairs(("a", "b", 1), ("c", "d", 0), ("b", "a", 0), ("c", "e", 1))
    store = prepare_store(recipe(rows, task="matching", format="pairs"), bpe, cache_root=cache)
    assert account(store)["rejected_by_reason"] == {"contradictory_label": 2}
    assert store.ids == ["train:2", "train:4"]


def test_leaks_into_ood_are_dropped_too(recipe, bpe):
    ledger = Ledger()
    records = load_records(recipe(FACTS, test=FACTS[:1], ood=FACTS[1:3]), "train", ledger)
    assert len(records) == 17
    assert ledger.rejected_by_reason == {"leak": 3}


def test_held_out_items_are_read_as_they_are(recipe):
    it = recipe(FACTS, test=[*FACTS[:2], FACTS[0]])
    assert [record.id for record in load_records(it, "test", Ledger())] == ["test:1", "test:2", "test:3"]
    assert [record.split for record in load_records(it, "test", Ledger())] == ["test"] * 3
    assert load_records(it, "ood", Ledger()) == []


def test_selected_ids_only(recipe, bpe, cache):
    it = recipe([*FACTS, {"relation": "P1"}], max_reject_fraction=0.1)
    store = prepare_store(it, bpe, only_ids=["train:7", "train:3"], cache_root=cache)
    assert store.ids == ["train:3", "train:7"]
    assert account(store)["num_not_selected"] == 18
    again = prepare_store(it, bpe, only_ids={"train:3", "train:7"}, cache_root=cache)
    assert again.fingerprint == store.fingerprint != store_fingerprint(it, bpe)
    with pytest.raises(UserInputError, match="1 of the selected records(.|\n)*got: nope(.|\n)*sftcore probe"):
        prepare_store(it, bpe, only_ids=["nope", "train:3"], cache_root=cache)


def test_same_stems_in_two_folders_get_distinct_ids(write, recipe, bpe, cache):
    files = [write(f"{folder}/f.jsonl", FACTS[i : i + 5]) for folder, i in (("x", 0), ("y", 5))]
    sources = [{"format": "facts", "path": str(file)} for file in files]
    ids = prepare_store(recipe(sources), bpe, cache_root=cache).ids
    assert ids == [f"{folder}/f:{i}" for folder in "xy" for i in range(1, 6)]


def test_a_file_listed_twice_is_an_error_that_says_so(write, recipe, bpe, cache):
    source = {"format": "facts", "path": str(write("f.jsonl", FACTS))}
    with pytest.raises(UserInputError, match="20 of 40 rows(.|\n)*duplicate_id: 20(.|\n)*listed twice"):
        prepare_store(recipe([source, source]), bpe, cache_root=cache)


def test_too_many_bad_rows_are_an_error_with_a_list_of_all(recipe, bpe, cache):
    bad = [{"relation": "P1", "subject": "x", "answers": []}] * 5
    with pytest.raises(UserInputError, match="5 of 25 rows can't be used") as caught:
        prepare_store(recipe([*FACTS, *bad]), bpe, cache_root=cache)
    (listed,) = cache.glob("*.ledger.jsonl")
    assert "all 5 dropped rows are listed" in str(caught.value) and str(listed) in str(caught.value)
    assert len(listed.read_text().splitlines()) == 5
    assert not list(cache.glob("*/manifest.json"))  # no store


def test_another_limit_makes_nothing_anew_and_holds_for_ready_stores_too(recipe, bpe, cache, monkeypatch):
    bad = [{"relation": "P1", "subject": "x", "answers": []}] * 5
    with pytest.raises(UserInputError, match="5 of 25 rows can't be used"):
        prepare_store(recipe([*FACTS, *bad]), bpe, cache_root=cache)
    monkeypatch.setattr("sftcore.data.workers.write_part", None)  # a second writing would fail
    lax = recipe([*FACTS, *bad], max_reject_fraction=0.2)
    store = prepare_store(lax, bpe, cache_root=cache)
    assert account(store)["rejected_by_reason"] == {"empty_answer": 5} and len(store) == 20
    with pytest.raises(UserInputError, match="5 of 25 rows can't be used(.|\n)*empty_answer: 5") as caught:
        prepare_store(recipe([*FACTS, *bad], max_reject_fraction=0.19), bpe, cache_root=cache)
    assert f"{store.folder}/ledger.jsonl: all 5 dropped rows are listed there" in str(caught.value)
    assert prepare_store(lax, bpe, cache_root=cache).ids == store.ids  # still there


def test_parts_stay_when_a_held_out_file_cannot_be_read(recipe, bpe, cache, monkeypatch):
    def unreadable(_):
        raise UserInputError(Problem(what="can't be read: Input/output error", where="test.jsonl"))

    it = recipe(FACTS, test=FACTS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "hash_held_out", unreadable)
        with pytest.raises(UserInputError, match="Input/output error"):
            prepare_store(it, bpe, cache_root=cache)
    monkeypatch.setattr("sftcore.data.workers.write_part", None)
    assert len(prepare_store(it, bpe, cache_root=cache)) == 19


def test_parts_that_never_make_a_store_are_removed(recipe, bpe, cache):
    with pytest.raises(UserInputError, match="selected records are not among"):
        prepare_store(recipe(FACTS), bpe, only_ids=["nope"], cache_root=cache)
    with pytest.raises(UserInputError, match=f"no row became a training sample\n.*leak: {len(FACTS)}"):
        prepare_store(recipe(FACTS, test=FACTS), bpe, cache_root=cache)
    assert not list(cache.glob("*.parts"))


def test_a_chat_leaks_by_any_of_its_trained_turns(recipe, chatml, cache):
    def chat(*texts):
        roles = ("user", "assistant") * len(texts)
        return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}

    train = [chat("1+1?", "2"), chat("2+2?", "4", "thanks", "bye"), chat("hi", "yo", "2+2?", "4")]
    again = [train[1] | {"id": "train:1"}]  # an id given twice is left out before anything is compared
    it = recipe(
        [*train, *again, chat("a", "b", "so", "c")], test=[chat("2+2?", "5"), chat("a", "b", "so", "d")],
        task="chat", format="jsonl", max_reject_fraction=0.5,
    )  # fmt: skip
    store = prepare_store(it, chatml, cache_root=cache)
    assert store.ids == ["train:1", "train:3"]
    assert account(store)["rejected_by_reason"] == {"leak": 2, "duplicate_id": 1}
    kept = load_records(it, "train", Ledger())
    assert [record.id for record in kept] == store.ids


def test_trivial_facts_go_into_the_ledger_and_are_no_fault_of_the_file(recipe, write):
    def fact(subject, answer):
        return {"relation": "P131", "subject": subject, "answers": [answer]}

    other = write("other.jsonl", [{"prompt": "a", "completion": "a"}])  # no fact
    it = recipe([fact("Wakefield Cathedral", "Wakefield"), fact("Peru", "Lima"), fact("Peru", "Lima")])
    it.data.train.append(it.data.train[0].model_copy(update={"format": "jsonl", "path": str(other)}))
    every, ledger = load_records(it, "train", Ledger()), Ledger()
    kept = load_records(it, "train", ledger, is_measured=True)
    assert len(every) == 4 and kept == every[1:]
    assert ledger.num_rows_read == len(kept) + ledger.num_rejected
    (entry,) = [entry for entry in ledger.entries() if entry["kind"] == "rejected"]
    assert (entry["reason"], entry["row"]) == ("answer_in_subject", 1)
    assert entry["excerpt"] == "Wakefield Cathedral: Wakefield"
    assert ledger.altered_by_reason["duplicate_kept"] == 1
    ledger.check(0.0, reasons=READING, num_rows=4)


def test_a_record_may_become_several_samples(recipe, bpe, cache, monkeypatch):
    """As a long text does: its samples follow each other, and it counts once in the account."""
    alone = Prompter.encode_batch

    def in_pieces(self, contents):
        return [(one, one, one) if content.subject == "S1" else one
                for content, one in zip(contents, alone(self, contents), strict=True)]  # fmt: skip

    monkeypatch.setattr(Prompter, "encode_batch", in_pieces)
    rows = [*FACTS[:4], FACTS[1] | {"id": "copy"}, FACTS[0] | {"id": "train:2"}, FACTS[1] | {"id": "train:2"}]
    it = recipe(rows, test=[FACTS[3]], max_reject_fraction=0.5)
    store = prepare_store(it, bpe, cache_root=cache)
    assert store.ids == ["train:1", *["train:2"] * 3, "train:3", *["copy"] * 3]
    assert store[1].input_ids.tolist() == store[3].input_ids.tolist() != store[4].input_ids.tolist()
    found = store.manifest
    assert found["rejected_by_reason"] == {"leak": 1, "duplicate_id": 2}
    assert (found["num_rows_read"], found["num_samples"], found["num_rejected"]) == (7, 8, 3)
    assert store.manifest["altered_by_reason"] == {"duplicate_kept": 1}
    chosen = prepare_store(it, bpe, only_ids=["train:1", "copy"], cache_root=cache)
    assert chosen.ids == ["train:1", *["copy"] * 3] and chosen.manifest["num_not_selected"] == 2


def test_a_verbatim_prompt_that_spells_out_a_held_out_fact_is_a_leak(recipe, bpe, cache, write):
    held_out = write("held.jsonl", [{"relation": "P36", "subject": "Peru", "answers": ["Lima"]}, FACTS[3]])
    template = {"prompt": "Q: {question}\nA:", "completion": " {answer}"}
    rows = [
        {"prompt": "Q: Where is S3?\nA:", "completion": " x"},
        {"prompt": "Where is S4?", "completion": " x"},
    ]
    prompter = Prompter(PromptOptions.of(recipe([FACTS[0]], template=template)), bpe)
    peru = Fact(relation="P36", subject="Peru", answers=("Lima",))
    asked = prompter.prompt_text(Record(id="x", split="test", file="f", row=1, content=peru))
    assert asked.startswith("Q: ") and "Peru" in asked
    rows.append({"prompt": asked.upper(), "completion": " x"})
    it = recipe(rows, test=[{"format": "facts", "path": str(held_out)}], format="jsonl", template=template)
    store = prepare_store(it, bpe, cache_root=cache)
    assert store.ids == ["train:2"] and account(store)["rejected_by_reason"] == {"leak": 2}
    assert [record.id for record in load_records(it, "train", Ledger())] == store.ids


def test_overlong_rows_count_against_the_limit_or_stop_the_run(recipe, bpe, cache):
    long = [FACTS[0] | {"subject": "L", "question": "Where " * 100 + "is it?"}]
    it = recipe([*FACTS, *long], max_length=60, max_reject_fraction=0.05)
    assert account(prepare_store(it, bpe, cache_root=cache))["rejected_by_reason"] == {"overlength": 1}
    with pytest.raises(
        UserInputError, match="overlength: 1(.|\n)*tokens, 60 fit(.|\n)*raise data.max_length"
    ):
        prepare_store(recipe([*FACTS, *long], max_length=60), bpe, cache_root=cache)
    strict = recipe([*FACTS, *long], max_length=60, max_reject_fraction=0.05, overlength="error")
    with pytest.raises(UserInputError, match="1 of 21 rows(.|\n)*set data.overlength: reject or trim_prompt"):
        prepare_store(strict, bpe, cache_root=cache)
    trimming = recipe([*FACTS, *long], max_length=60, overlength="trim_prompt")
    assert account(prepare_store(trimming, bpe, cache_root=cache))["altered_by_reason"] == {
        "prompt_trimmed": 1
    }


def test_when_every_selected_row_is_too_long_the_limit_is_theirs(recipe, bpe, cache):
    long = [FACTS[0] | {"id": "L", "subject": "L", "question": "Where " * 100 + "is it?"}]
    it = recipe([*FACTS, *long], max_length=60, max_reject_fraction=0.5)
    with pytest.raises(UserInputError, match="1 of 2 rows can't be used"):
        prepare_store(it.model_copy(update={"data": it.data.model_copy(update={"max_reject_fraction": 0.4})}),
                      bpe, only_ids=["L", "train:1"], cache_root=cache)  # fmt: skip


def test_formats_that_the_task_cannot_use_are_all_named(recipe, bpe, cache):
    rows = pairs(("a", "b", 1))
    with pytest.raises(UserInputError, match="task qa can't use format pairs") as caught:
        prepare_store(recipe(rows, test=rows, format="pairs"), bpe, cache_root=cache)
    assert "data.train.0.format" in str(caught.value) and "data.test.0.format" in str(caught.value)
    assert "allowed: entityquestions, facts, jsonl" in str(caught.value)


def test_a_finished_store_is_reused(recipe, bpe, cache, monkeypatch):
    it = recipe(FACTS)
    first = prepare_store(it, bpe, cache_root=cache)
    monkeypatch.setattr(prepare_module, "_build", None)  # a second writing would fail
    assert prepare_store(it, bpe, cache_root=cache).ids == first.ids
    assert prepare_store(it, build_bpe(), cache_root=cache).fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["part-00000/labels.bin", "outcome.bin", "manifest.json"])
def test_a_damaged_store_is_written_again(recipe, bpe, cache, name, caplog):
    it = recipe(FACTS)
    first = prepare_store(it, bpe, cache_root=cache)
    path = first.folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x01")
    assert prepare_store(it, bpe, cache_root=cache).ids == first.ids
    assert path.read_bytes() == whole
    assert "damaged: writing it again" in caplog.text


def test_fingerprint_covers_all_that_decides_the_samples(write, recipe, bpe, bpe_bos, chatml, monkeypatch):
    base = recipe(FACTS, test=FACTS[:2])
    seen = {store_fingerprint(base, bpe)}
    assert store_fingerprint(base, bpe) in seen  # stable
    for changes in (
        {"template": "qa-lines"},
        {"template": {"prompt": "<|question|> {question} <|answer|>", "completion": " {answer} "}},
        {"overlength": "trim_prompt"},
        {"deduplicate": True},
        {"max_length": 100},
    ):
        seen.add(store_fingerprint(recipe(FACTS, test=FACTS[:2], **changes), bpe))
    seen |= {store_fingerprint(base, tokenizer) for tokenizer in (bpe_bos, chatml)}
    seen |= {store_fingerprint(base, bpe, only_ids=ids) for ids in ([], ["train:1"], ["train:2"])}
    limited = base.data.train[0].model_dump() | {"limit": 3}
    seen.add(store_fingerprint(recipe([limited], test=FACTS[:2]), bpe))
    write("train.jsonl", FACTS[:19])
    seen.add(store_fingerprint(base, bpe))
    write("train.jsonl", FACTS)
    write("test.jsonl", FACTS[:1])  # decides which rows are leaks
    seen.add(store_fingerprint(base, bpe))
    write("test.jsonl", FACTS[:2])
    assert store_fingerprint(base, bpe) in seen
    monkeypatch.setattr("sftcore.data.fingerprint.CODE_VERSION", 99)
    seen.add(store_fingerprint(base, bpe))
    assert len(seen) == 15


def test_the_same_data_elsewhere_has_the_same_fingerprint(write, recipe, bpe):
    prints = set()
    for folder in ("x", "y"):
        path = write(f"{folder}/f.jsonl", FACTS)
        prints.add(store_fingerprint(recipe([{"format": "facts", "path": str(path)}]), bpe))
    assert len(prints) == 1


def _prepare_in_a_process(recipe: Recipe, cache: Path, barrier, results) -> None:
    tokenizer = build_bpe()
    barrier.wait(timeout=60)
    store = prepare_store(recipe, tokenizer, cache_root=cache)
    store.verify()
    results.put((store.fingerprint, store.ids, store.manifest["num_tokens"]))


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_at_once_both_end_with_a_good_store(recipe, bpe, cache, locks, monkeypatch):
    """With locks the second waits; without (some cluster file systems have none) the first rename wins."""
    if not locks:
        monkeypatch.setattr(prepare_module, "folder_lock", _no_lock)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    it = recipe(FACTS * 20)
    workers = [
        context.Process(target=_prepare_in_a_process, args=(it, cache, barrier, results)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    first, second = (results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert first == second and len(first[1]) == 400
    assert [p.name for p in cache.iterdir() if not p.name.startswith(".")] == [first[0]]
    assert not list(cache.glob(".*.tmp"))


def _no_lock(folder, *, purpose, wait=False):
    import contextlib

    return contextlib.nullcontext()


def test_a_file_system_without_locks_gets_a_warning(recipe, bpe, cache, monkeypatch, caplog):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert len(prepare_store(recipe(FACTS), bpe, cache_root=cache)) == 20
    assert "no file locks there" in caplog.text


def test_a_full_disk_leaves_no_store(recipe, bpe, cache, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sftcore.data.parts.write_json", full)
    with pytest.raises(MissingEnvironmentError, match="No space left"):
        prepare_store(recipe(FACTS), bpe, cache_root=cache)
    (parts,) = (p for p in cache.iterdir() if p.name != ".locks")
    assert parts.suffix == ".parts" and list(parts.iterdir()) == []
    monkeypatch.undo()
    assert len(prepare_store(recipe(FACTS), bpe, cache_root=cache)) == 20
    assert not parts.exists()


def test_the_account_is_one_sentence_for_people(recipe, bpe, cache):
    store = prepare_store(recipe(FACTS, test=FACTS[:1]), bpe, cache_root=cache)
    said = describe_store(store)
    assert said.startswith("19 samples of ") and "from 20 rows, 1 rejected (leak 1): " in said
    assert said.endswith(f"{store.folder} (ledger.jsonl lists such rows)") and "_by_reason" not in said
    one = describe_store(prepare_store(recipe(FACTS[:1]), bpe, cache_root=cache))
    assert one.startswith("1 sample of ") and " from 1 row: " in one and "ledger" not in one
    noted = describe_store(prepare_store(recipe([*FACTS, FACTS[0]]), bpe, cache_root=cache))
    assert ", noted: duplicate kept 1: " in noted and noted.endswith("(ledger.jsonl lists such rows)")


def test_equal_prompts_with_different_answers_are_kept_and_counted(recipe, bpe, cache):
    rows = [
        {"relation": "P19", "subject": "Ann", "answers": ["Rome"]},
        {"relation": "P19", "subject": "Ann", "answers": ["Paris"]},
        {"relation": "P19", "subject": "Bo", "answers": ["Rome"]},
        {"relation": "P19", "subject": "Bo", "answers": ["Rome"]},
        {"relation": "P19", "subject": "Cy", "answers": ["Rome"], "question": "Where was Di born?"},
        {"relation": "P20", "subject": "Di", "answers": ["Oslo"], "question": "Where was Di born?"},
    ]
    it = recipe(rows)
    store = prepare_store(it, bpe, cache_root=cache)
    assert account(store)["num_samples"] == 6
    assert store.manifest["altered_by_reason"] == {"duplicate_kept": 1, "other_answer": 4}
    listed = [
        e["row"] for e in read_jsonl(store.folder / "ledger.jsonl") if e.get("change") == "other_answer"
    ]
    assert listed == [1, 2, 5, 6]
    report = check_store(it, store)
    assert report["other_answers"] == 4
    assert "other answers    4 samples share a prompt that is answered otherwise" in check_text(report)


SAID = (("system", "Be."), ("user", "Hi"), ("assistant", "yo"))
CHAT = {"messages": [{"role": role, "content": text} for role, text in SAID]}
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def test_system_turns_go_where_the_recipe_says(recipe, cache, write):
    tokenizer = build_bpe()
    tokenizer.chat_template = STRICT + CHATML
    about = {"task": "chat", "format": "jsonl"}
    with pytest.raises(UserInputError, match="no system(.|\n)*data.system: merge"):
        prepare_store(recipe([CHAT], **about), tokenizer, cache_root=cache)
    for system, said, change in (("merge", "Be.\n\nHi", "system_merged"), ("drop", "Hi", "system_dropped")):
        store = prepare_store(recipe([CHAT], system=system, **about), tokenizer, cache_root=cache)
        text = tokenizer.decode(store[0].input_ids)
        assert f"user\n{said}<|im_end|>" in text and text.endswith("assistant\nyo<|im_end|>")
        assert account(store)["num_samples"] == 1 and store.manifest["altered_by_reason"] == {change: 1}


def test_only_the_last_answer_is_trained_where_the_recipe_says_so(recipe, cache):
    tokenizer = build_bpe()
    tokenizer.chat_template = (  # the last answer ends otherwise than those before
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' and "
        "loop.last and not add_generation_prompt %}<|endoftext|>{% else %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"role": role, "content": f"{role[0]}{n}"} for n in range(2) for role in ("user", "assistant")]
    about = {"task": "chat", "format": "jsonl"}
    with pytest.raises(UserInputError, match="refused_by_template: 1(.|\n)*data.train_answers: last"):
        prepare_store(recipe([{"messages": turns}], **about), tokenizer, cache_root=cache)
    last = recipe([{"messages": turns}, {"messages": turns[:2]}], train_answers="last", **about)
    store = prepare_store(last, tokenizer, cache_root=cache)
    assert store.manifest["altered_by_reason"] == {"earlier_untrained": 1}
    sample = store[0]
    assert tokenizer.decode(sample.labels[sample.labels >= 0]) == "a1<|endoftext|>"
    fed = "<|im_start|>user\nu0<|im_end|><|im_start|>assistant\na0<|im_end|><|im_start|>user\nu1<|im_end|>"
    assert tokenizer.decode(sample.input_ids) == f"{fed}<|im_start|>assistant\na1<|endoftext|>"


def test_a_turn_that_holds_a_plain_marker_of_the_template_is_counted_by_its_name(recipe, cache):
    tokenizer = build_bpe()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
        "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )

    def row(*said):
        roles = ("user", "assistant") * len(said)
        return {"messages": [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]}

    rows = [row("hi", "yo"), row("a [/INST] b [INST] c", "yo"), row("x", "[INST] y"), row("[INST", "INST]")]
    store = prepare_store(recipe(rows, task="chat", format="jsonl"), tokenizer, cache_root=cache)
    noted = store.manifest["altered_by_reason"]
    assert len(store) == 4 and noted.pop("seam_apart", 0) <= 4
    assert noted == {"marker_in_text": 2, "marker_in_text [/INST]": 1, "marker_in_text [INST]": 2}
    assert "marker in text [INST] 2" in describe_store(store)
    ledger = read_jsonl(store.folder / "ledger.jsonl")
    assert [e["row"] for e in ledger if e.get("change") == "marker_in_text"] == [2, 3]


def test_the_day_of_a_template_is_part_of_a_stores_key(recipe, cache):
    tokenizer = build_bpe()
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + CHATML.replace(
        "{% if loop.first", "{% if false"
    )
    days = {}
    for today in ("2025-01-02", "2025-01-03"):
        it = recipe([CHAT], task="chat", format="jsonl", today=today)
        store = prepare_store(it, tokenizer, cache_root=cache)
        days[store.fingerprint] = tokenizer.decode(store[0].input_ids)[:10]
    assert sorted(days.values()) == ["2025-01-02", "2025-01-03"]
    with pytest.raises(UserInputError, match="reads the clock"):
        prepare_store(recipe([CHAT], task="chat", format="jsonl"), tokenizer, cache_root=cache)
