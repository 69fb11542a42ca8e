"""Models with code of their own: it travels with exports and merges, and nothing asks on the terminal."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch
from launching import run_cells, write_recipe
from tiny import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftcore.fsio import read_json, write_json
from sftcore.model.code import copy_code
from sftcore.stages.export import export_run

CONFIGURATION = (
    "from transformers import LlamaConfig\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
)
MODEL = """
import torch
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .scaling import SCALE

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.register_forward_hook(lambda module, args, output: output * SCALE)
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


@pytest.fixture
def own_model(tmp_path) -> Path:
    folder = tmp_path / "own"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODEL)
    (folder / "tokenization_own.py").write_text(TOKENIZER)
    (folder / "scaling.py").write_text("SCALE = 0.5\n")
    config = read_json(folder / "config.json")
    own = {"model_type": "own-llama", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP}
    write_json(folder / "config.json", config | own)
    tokenizer = read_json(folder / "tokenizer_config.json")
    mapped = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    write_json(
        folder / "tokenizer_config.json", tokenizer | {"tokenizer_class": "OwnTokenizer", "auto_map": mapped}
    )
    return folder


def loaded(folder: Path):
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def test_code_travels_and_no_one_is_asked(tiny_recipe, own_model, tmp_path, monkeypatch):
    from peft import PeftModel

    model = {"path": str(own_model), "dtype": "float32", "trust_remote_code": True}
    full = write_recipe(tiny_recipe, "full", model=model, train={"epochs": 1})
    lora = write_recipe(
        tiny_recipe, "lora", model=model, train={"epochs": 1}, adapter={"kind": "lora", "r": 4}
    )
    run_cells([full, lora], ranks=1)
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on the terminal"))
    export_run(Path("runs/full"), Path("copy"), merge=False)
    export_run(Path("runs/lora"), Path("merged"), merge=True)
    before = logits(loaded(own_model))
    theirs = logits(PeftModel.from_pretrained(loaded(own_model), "runs/lora/adapter").eval())
    own_model.rename(tmp_path / "elsewhere")
    for folder in map(Path, ("copy", "merged")):
        again = loaded(folder)
        assert type(again).__name__ == "OwnForCausalLM"
        assert type(AutoTokenizer.from_pretrained(folder, trust_remote_code=True)).__name__ == "OwnTokenizer"
        assert {file.name for file in folder.glob("*.py")} == {
            file.name for file in (tmp_path / "elsewhere").glob("*.py")
        }
    assert torch.allclose(logits(loaded(Path("merged"))), theirs, atol=1e-5)
    assert not torch.allclose(theirs, before, atol=1e-3)


def test_names_of_the_hub_become_names_in_the_folder(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "out"
    (base / "parts").mkdir(parents=True)
    folder.mkdir()
    (base / "parts" / "layer.py").write_text("X = 1\n")
    mapping = {"AutoConfig": "org/name--conf.Conf", "AutoTokenizer": ["org/name--tok.Slow", None]}
    write_json(folder / "config.json", {"auto_map": mapping})
    copy_code(base, folder)
    assert read_json(folder / "config.json")["auto_map"] == {
        "AutoConfig": "conf.Conf",
        "AutoTokenizer": ["tok.Slow", None],
    }
    assert (folder / "parts" / "layer.py").read_text() == "X = 1\n"
