"""The tokenizer's edge: what it adds by itself, what identifies it, which folders are refused."""

from __future__ import annotations

import json

import pytest
from tiny_tokenizers import build_bpe

from sftcore.data.tokens import Codec, codec_of, load_tokenizer, tokenizer_identity
from sftcore.errors import MissingEnvironmentError, UserInputError
from sftcore.fsio import fingerprint_of

START, END = 1, 2  # <|im_start|>, <|im_end|>


def test_prefix_is_what_the_tokenizer_adds_itself(bpe, bpe_bos, bpe_bos_eos, words):
    assert [codec_of(t).prefix for t in (bpe, bpe_bos, bpe_bos_eos, words)] == [(), (START,), (START,), (1,)]
    assert bpe.bos_token_id == START  # it has a bos token, but doesn't add it: so neither do we


def test_encode_is_bare(bpe_bos_eos):
    codec = codec_of(bpe_bos_eos)
    (ids,) = codec.encode(["Paris"])
    assert START not in ids and END not in ids
    assert codec.with_prefix(ids) == [START, *ids] == codec.with_prefix([START, *ids])
    assert codec.encode([]) == []


def test_prompts_have_the_prefix_and_never_the_suffix(bpe, bpe_bos, bpe_bos_eos):
    (bare,) = codec_of(bpe).encode(["Where is Paris?"])
    assert bpe_bos_eos("Where is Paris?")["input_ids"] == [START, *bare, END], "it ends a text by itself"
    found = [codec_of(t).encode_prompts(["Where is Paris?"]) for t in (bpe, bpe_bos, bpe_bos_eos)]
    assert found == [[bare], [[START, *bare]], [[START, *bare]]]


def test_special_tokens_in_a_text_are_special(bpe):
    codec = codec_of(bpe)
    assert codec.encode(["<|im_start|>a"])[0][0] == START
    assert codec.special_ids == {0, START, END}


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(UserInputError, match='no end-of-sequence token(.|\n)*do: set "eos_token"'):
        codec_of(build_bpe(with_eos_token=False))


def test_a_tokenizer_that_encodes_nothing_is_refused():
    class Mute:
        eos_token_id, name_or_path = 0, "mute"
        added_tokens_decoder, all_special_ids = {}, [0]

        def __call__(self, text, **options):
            return {"input_ids": []}

    with pytest.raises(UserInputError, match="encodes none of the probe texts"):
        codec_of(Mute())


def test_identity_outlives_use_and_a_round_trip(bpe, tmp_path):
    bpe.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    loaded = load_tokenizer(str(tmp_path))
    before = fingerprint_of(tokenizer_identity(loaded))
    assert len(codec_of(loaded).encode(["Where is Paris? Paris is in France."])[0]) > 5  # never truncates
    assert fingerprint_of(tokenizer_identity(loaded)) == before
    assert fingerprint_of(tokenizer_identity(load_tokenizer(str(tmp_path)))) == before


def test_identity_sees_vocabulary_special_tokens_and_chat_template(bpe, bpe_bos, chatml):
    prints = {fingerprint_of(tokenizer_identity(t)) for t in (bpe, bpe_bos, chatml)}
    other_pad = build_bpe()
    other_pad.pad_token = "<|endoftext|>"
    prints.add(fingerprint_of(tokenizer_identity(other_pad)))
    assert len(prints) == 4


def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path):
    with pytest.raises(UserInputError, match=f"{tmp_path.name}: no usable tokenizer(.|\n)*tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{nope")
    with pytest.raises(UserInputError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nope"}}')
    with pytest.raises(UserInputError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_file_for_a_model_is_named_before_anything_is_looked_up(tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(
        UserInputError, match=r"model.safetensors: this is a file(.|\n)*do: .*the folder"
    ) as caught:
        load_tokenizer(str(tmp_path / "model.safetensors"))
    assert caught.value.exit_code == 2


def test_a_hub_name_out_of_reach_is_an_environment_problem(monkeypatch):
    import transformers

    def unreachable(*args, **options):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(
        MissingEnvironmentError, match="some/model: can't get the tokenizer: We couldn't(.|\n)*model pull"
    ):
        load_tokenizer("some/model")


def test_a_slow_tokenizer_is_refused(monkeypatch):
    import transformers

    class Slow:
        is_fast = False

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: Slow())
    with pytest.raises(UserInputError, match="no fast .* version(.|\n)*got: Slow"):
        load_tokenizer("m")


def test_codec_is_frozen(bpe):
    assert isinstance(codec_of(bpe), Codec)
    with pytest.raises(AttributeError):
        codec_of(bpe).stop_id = 3


def test_a_chat_template_is_chosen_by_name_or_file(tmp_path):
    from tiny_tokenizers import CHATML

    from sftcore.data.chat_template import template_of

    tokenizer = build_bpe()
    tokenizer.chat_template = {"rag": "R", "tool_use": "T"}
    tokenizer.save_pretrained(tmp_path / "m")
    folder, file = str(tmp_path / "m"), tmp_path / "own.jinja"
    file.write_text(CHATML)
    with pytest.raises(
        UserInputError, match="several chat templates(.|\n)*rag, tool_use(.|\n)*model.chat_template"
    ):
        template_of(load_tokenizer(folder))
    assert template_of(load_tokenizer(folder, chat_template="rag")) == "R"
    assert template_of(load_tokenizer(folder, chat_template=str(file))) == CHATML
    with pytest.raises(UserInputError, match="no such chat template(.|\n)*got: rga(.|\n)*rag, tool_use"):
        load_tokenizer(folder, chat_template="rga")
    tokenizer.chat_template = {"default": "D", "rag": "R"}
    assert template_of(tokenizer) == "D"
