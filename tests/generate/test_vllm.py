"""vLLM behind the probe: what it is asked, by its documented signature; where it is installed, for real."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
from transformers import AutoConfig

from sftcore.config import ModelSettings, ProbeSettings, Recipe
from sftcore.errors import MissingEnvironmentError, UserInputError
from sftcore.generate.api import Decoding
from sftcore.generate.vllm import VllmGenerator, load_vllm, seed_of

SETTINGS = ProbeSettings(backend="vllm", samples=3, max_new_tokens=5, temperature=0.7)


@dataclass
class SamplingParams:
    """The fields of vLLM 0.32's that are used, with its defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    detokenize: bool = True


@dataclass
class LLM:
    """`vllm.LLM` as its documentation has it: keyword arguments; a list of prompts, one setting each."""

    model: str
    dtype: str
    seed: int
    max_model_len: int
    enable_prefix_caching: bool
    trust_remote_code: bool
    disable_log_stats: bool
    asked: list = field(default_factory=list)

    def generate(self, prompts, sampling_params, *, use_tqdm):
        self.asked += zip(prompts, sampling_params, strict=True)
        return [
            SimpleNamespace(  # completions come as they end
                outputs=[
                    SimpleNamespace(index=i, token_ids=(prompt["prompt_token_ids"][0], i))
                    for i in reversed(range(params.n))
                ]
            )
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # taken back behind the test


def test_completions_are_seeded_by_their_prompt_and_lie_side_by_side(vllm, tiny_model_folder):
    path = str(tiny_model_folder)
    engine = load_vllm(ModelSettings(path=path, dtype="bfloat16"), SETTINGS, seed=17)
    assert (engine.model, engine.dtype, engine.enable_prefix_caching) == (path, "bfloat16", True)
    context = AutoConfig.from_pretrained(path).max_position_embeddings
    assert engine.max_model_len == min(context, 512 + 5)
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: " ".join(map(str, tokens)))
    generator = VllmGenerator(engine, tokenizer)
    seeds = [seed_of(17, "one"), seed_of(17, "two")]
    options = {"temperature": 0.7, "completions_per_prompt": 3, "seeds": seeds}
    decoding = Decoding(max_new_tokens=5, **options)
    with pytest.raises(UserInputError, match=r"(?s)too long a prompt.*got: 1 1 1"):
        generator.complete([[1] * 513], decoding)
    found = generator.complete([[11, 1], [12]], decoding)
    assert [[reply.text for reply in of_prompt] for of_prompt in found] == [
        ["11 0", "11 1", "11 2"],
        ["12 0", "12 1", "12 2"],
    ]
    assert [of_prompt[0].num_input_tokens for of_prompt in found] == [2, 1]
    for (prompt, params), (text, ids) in zip(engine.asked, [("one", [11, 1]), ("two", [12])], strict=True):
        assert prompt == {"prompt_token_ids": ids}
        assert (params.n, params.max_tokens, params.temperature) == (3, 5, 0.7)
        assert (params.top_p, params.top_k, params.detokenize) == (1.0, 0, False)
        assert params.seed == seed_of(17, text) and 0 <= params.seed < 2**31
    assert seed_of(17, "one") != seed_of(17, "two") != seed_of(18, "two")


def test_without_vllm_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingEnvironmentError, match=r"(?s)vLLM can't be imported.*pip install vllm.*hf"):
        load_vllm(ModelSettings(path="m"), SETTINGS, seed=1)


def test_an_adapter_is_not_its_to_load(vllm, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserInputError, match=r"(?s)whole models only.*export --merge"):
        load_vllm(ModelSettings(path=str(tmp_path)), SETTINGS, seed=1)


def test_a_model_that_it_refuses_is_told(vllm, monkeypatch, tiny_model_folder):
    def refuse(**_):
        raise ValueError("Model architectures ['Odd'] are not supported\nmore")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", refuse)
    with pytest.raises(MissingEnvironmentError, match="can't run this model here: Model arch.*supported"):
        load_vllm(ModelSettings(path=str(tiny_model_folder)), SETTINGS, seed=1)


def test_only_sampling_goes_with_it():
    data, batch = {"train": [{"format": "facts", "path": "x"}]}, {"samples_per_step": 1}
    probe = {"backend": "vllm", "estimator": "likelihood"}
    with pytest.raises(ValueError, match="set estimator: sampling, or backend: hf"):
        Recipe.model_validate({"model": {"path": "m"}, "data": data, "batch": batch, "probe": probe})


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
def test_greedy_completions_are_transformers_own():
    import torch
    from packaged import packaged_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = packaged_model("smollm2-135m")
    settings = ProbeSettings(backend="vllm", samples=1, max_new_tokens=8, temperature=1e-6)
    engine = load_vllm(ModelSettings(path=str(folder), dtype="float32"), settings, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["The capital of France is", "The chemical symbol of gold is"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    decoding = Decoding(max_new_tokens=8, temperature=1e-6, seeds=[1, 1])
    found = VllmGenerator(engine, tokenizer).complete(prompts, decoding)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for ids, (reply,) in zip(prompts, found, strict=True):
        whole = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
        assert reply.text == tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)
