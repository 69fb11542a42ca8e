"""Backends hand their kernels the right documents, windows and scales; a lack is refused by name.

The CUDA kernels can't run on a CPU: a stand-in with the documented signature records the call and computes
what the documentation says, in plain torch, so that a wrong window or a swapped shape shows as a wrong
number.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import TINY, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, PreTrainedModel

from sftcore.batching.collate import UNTRAINED, Batch, collate
from sftcore.config import Recipe
from sftcore.errors import UserInputError
from sftcore.generate import prefix_cache
from sftcore.model import load, saved
from sftcore.model.attention import BACKENDS, ability_table, choose_attention, flash, torch_varlen, tree
from sftcore.model.attention.flex import flex_docs_attention
from sftcore.model.attention.needs import AttentionNeeds, needs_of
from sftcore.model.attention.sdpa_docs import sdpa_docs_attention
from sftcore.objectives import load_objective

LENGTHS = (5, 9, 5, 1)
CUDA = {"dtype": "bfloat16", "device": "cuda", "head_size": 64, "value_size": 64}
LAYER = torch.nn.Module()  # what calls an attention


def inputs(
    device: str = "cpu", dtype: torch.dtype = torch.float32, heads: int = 4, groups: int = 2, size: int = 8
):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    q = torch.randn(1, heads, total, size, device=device, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(1, groups, total, size, device=device, dtype=dtype, requires_grad=True) for _ in range(2)
    )
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return (q, k, v), {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
        "document_lengths": LENGTHS,
        "scaling": 0.3,
    }


def documented_attention(q, k, v, borders, *, scale, left, right, softcap=0.0):
    """(T, H, D) attention per document; left and right are how far a query sees, negative: without limit."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    outputs = []
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= distance >= -right if right >= 0 else seen
        seen &= distance <= left if left >= 0 else seen
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v[start:end]))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_the_reference_itself_follows_the_definition(window):
    (q, k, v), document = inputs()
    found, _ = sdpa_docs_attention(LAYER, q, k, v, None, sliding_window=window, **document)
    expected = documented_attention(
        *(t[0].transpose(0, 1) for t in (q, k, v)),
        document["cu_seq_lens_q"],
        scale=0.3,
        left=-1 if window is None else window - 1,
        right=0,
    )
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("has_gqa", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_torch_varlen_hands_over_documents_windows_and_groups(monkeypatch, window, has_gqa):
    calls = []

    def compute(query, key, value, cu_seq_q, cu_seq_k, scale, window_size):
        calls.append((key.shape, cu_seq_q is cu_seq_k))
        left, right = window_size
        return documented_attention(query, key, value, cu_seq_q, scale=scale, left=left, right=right)

    def with_gqa(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False
    ):  # 2.12 and later
        assert max_q == max_k == 9 and enable_gqa
        return compute(query, key, value, cu_seq_q, cu_seq_k, scale, window_size)

    def without_gqa(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):  # 2.11
        assert query.shape == key.shape
        return compute(query, key, value, cu_seq_q, cu_seq_k, scale, window_size)

    monkeypatch.setattr(torch_varlen.varlen, "varlen_attn", with_gqa if has_gqa else without_gqa)
    check(torch_varlen.torch_varlen_attention, window)
    assert calls == [((20, 2 if has_gqa else 4, 8), True)]


@pytest.mark.parametrize(("module", "unlimited"), [("flash_attn", -1), ("flash_attn.cute", None)])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flash_hands_over_documents_windows_and_caps(monkeypatch, module, unlimited, window, softcap):
    calls = []

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
    ):
        calls.append(window_size)
        assert causal and cu_seqlens_q.dtype == torch.int32 and max_seqlen_q == max_seqlen_k == 9
        left, _ = (-1 if side is None else side for side in window_size)
        out = documented_attention(
            q, k, v, cu_seqlens_q, scale=softmax_scale, left=left, right=0, softcap=softcap
        )
        return (out, None) if module == "flash_attn.cute" else out

    monkeypatch.setattr(flash, "find_kernel", lambda: (module, flash_attn_varlen_func))
    check(flash.flash_attention, window, softcap)
    assert calls == [(unlimited, unlimited) if window is None else (2, 0)]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flex_masks_documents_and_windows(window, softcap):
    check(flex_docs_attention, window, softcap, trains=False)


def check(attention, window, softcap=None, trains=True) -> None:
    """Equal to the definition, forward, and shaped as transformers wants it."""
    (q, k, v), document = inputs()
    q, k, v = (t.requires_grad_(trains) for t in (q, k, v))
    found, weights = attention(LAYER, q, k, v, None, sliding_window=window, softcap=softcap, **document)
    expected = documented_attention(
        *(t[0].transpose(0, 1) for t in (q, k, v)),
        document["cu_seq_lens_q"],
        scale=0.3,
        left=-1 if window is None else window - 1,
        right=0,
        softcap=softcap or 0.0,
    )
    assert found.shape == (1, 20, 4, 8) and weights is None
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_needs_are_read_from_the_configuration():
    config = tiny_config("gemma3")
    config.attn_logit_softcapping = 50.0
    assert needs_of(config, dtype="bfloat16", device="cuda") == AttentionNeeds(
        head_size=8, value_size=8, dtype="bfloat16", device="cuda", softcap=50.0
    )


@pytest.mark.parametrize(
    ("backend", "change", "reason"),
    [
        ("flash_attn", {"device": "cpu"}, "needs a CUDA device"),
        ("flash_attn", {"dtype": "float32"}, "computes in bfloat16, not float32"),
        ("flash_attn", {"head_size": 512, "value_size": 512}, "at most 256"),
        ("flash_attn", {"sinks": True}, "no attention sinks"),
        ("flash_attn", {"value_size": 32}, "not 32 next to 64"),
        ("flash_attn", {"both_ways": True}, "looks both ways"),
        ("torch_varlen", {"device": "cpu"}, "needs a CUDA device"),
        ("torch_varlen", {"dtype": "float32"}, "computes in bfloat16"),
        ("torch_varlen", {"head_size": 512, "value_size": 512}, "at most 256"),
        ("torch_varlen", {"softcap": 50.0}, "no soft cap"),
        ("torch_varlen", {"sinks": True}, "no attention sinks"),
        ("torch_varlen", {"value_size": 32}, "not 32 next to 64"),
        ("flex", {"device": "cpu"}, "trains on CUDA devices only"),
        ("flex", {"sinks": True}, "no attention sinks"),
        ("sdpa_docs", {"softcap": 50.0}, "no soft cap"),
        ("sdpa_docs", {"sinks": True}, "no attention sinks"),
        ("sdpa_docs", {"both_ways": True}, "looks both ways"),
        ("sdpa_docs", {"chunks": True}, "no chunked attention"),
    ],
)
def test_each_lack_is_named(monkeypatch, backend, change, reason):
    monkeypatch.setattr(flash, "find_kernel", lambda: ("flash_attn", None))
    lacks = BACKENDS[backend][1]
    assert lacks(AttentionNeeds(**CUDA)) == []
    assert any(reason in why for why in lacks(AttentionNeeds(**(CUDA | change))))


def test_without_our_guard_cuda_backends_fail_on_cpus():
    """What torch 2.13 says; flash-attn is not even there."""
    q, k = (torch.randn(1, heads, 8, 16, requires_grad=True) for heads in (4, 2))
    borders = {"cu_seq_lens_q": torch.tensor([0, 8], dtype=torch.int32), "max_length_q": 8}
    with pytest.raises(NotImplementedError, match="_flash_attention_forward.*'CPU' backend"):
        BACKENDS["torch_varlen"][0](LAYER, q, k, k, None, scaling=0.25, **borders)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        BACKENDS["flex"][0](LAYER, q, k, k, None, document_lengths=(8,), scaling=0.25)[0].sum().backward()


def test_auto_takes_the_first_that_can(monkeypatch):
    config = tiny_config("llama")
    assert choose_attention(config, "auto", dtype="bfloat16", device="cpu") == "sftcore_packed_documents"
    assert choose_attention(config, "auto", dtype="bfloat16", device="cuda") == "sftcore_packed_varlen"
    assert choose_attention(config, "auto", dtype="float32", device="cuda") == "sftcore_packed_blocks"
    monkeypatch.setattr(flash, "find_kernel", lambda: ("flash_attn", None))
    assert choose_attention(config, "auto", dtype="bfloat16", device="cuda") == "sftcore_packed_fa"


def test_a_wish_that_cannot_be_met_is_refused_with_the_reason():
    with pytest.raises(UserInputError, match="(?s)torch_varlen: it needs a CUDA device.*attention: auto"):
        choose_attention(tiny_config("llama"), "torch_varlen", dtype="bfloat16", device="cpu")
    config = tiny_config("llama")
    config.attn_logit_softcapping = 50.0
    with pytest.raises(UserInputError, match="sdpa_docs: it has no soft cap"):
        choose_attention(config, "auto", dtype="bfloat16", device="cpu")


def test_a_missing_or_broken_flash_package_is_not_found(monkeypatch):
    flash.find_kernel.cache_clear()
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(
        flash.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError("undefined symbol"))
    )
    assert flash.find_kernel() is None
    flash.find_kernel.cache_clear()


def test_the_readme_shows_what_each_backend_can_do():
    assert ability_table() in (Path(__file__).parents[2] / "docs" / "running.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_models_load_for_training_with_every_backend(tmp_path, monkeypatch, kind, backend):
    """As on a GPU, but for the kernels: what these need must reach them in the proof as in training."""
    config = tiny_config(kind)
    if backend != "sdpa_docs":
        stand_in_for_kernels(monkeypatch)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with torch.no_grad():  # flex on a CPU goes forward only
        losses = [
            load_objective(recipe_for(tmp_path, attention=name))(packed(LENGTHS))[0].item()
            for name in (backend, "auto")
        ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_a_model_is_proven_where_it_is_trained(tmp_path, monkeypatch):
    """Weights are read into host memory; CUDA's attentions can't compute there."""
    places, proofs = [], []
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, device: places.append(str(device)))
    monkeypatch.setattr(load.dist, "device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(load, "prove_head_and_packs", lambda _: proofs.append(list(places)))
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    load_objective(recipe_for(tmp_path))
    assert proofs == [["cuda:1"]] and places == ["cuda:1", "cpu"]


def stand_in_for_kernels(monkeypatch) -> None:
    """Documented mathematics in the CUDA kernels' places, and a choice of backends as for a GPU."""

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        left, right = window_size
        return documented_attention(q, k, v, cu_seq_q, scale=scale, left=left, right=right)

    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, softmax_scale, window_size, softcap, **_):
        left = window_size[0]
        return documented_attention(
            q, k, v, cu_seqlens_q, scale=softmax_scale, left=left, right=0, softcap=softcap
        )

    monkeypatch.setattr(torch_varlen.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(flash, "find_kernel", lambda: ("flash_attn", flash_attn_varlen_func))

    def choose(config, wish, *, dtype, device):
        return choose_attention(config, wish, dtype=dtype, device="cpu" if wish == "auto" else "cuda")

    monkeypatch.setattr(load, "choose_attention", choose)


def recipe_for(folder: Path, **model) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(folder), "dtype": "bfloat16", **model},
            "data": {"train": [{"format": "jsonl", "path": "x"}]},
            "batch": {"samples_per_step": 3},
        }
    )


def packed(lengths) -> Batch:
    made = []
    for number, length in enumerate(lengths):
        ids = (np.arange(length) * 7 + 11 * number + 1).astype(np.int32) % 300
        labels = np.append(ids[1:], 0 if length == 1 else UNTRAINED).astype(np.int32)
        made.append(SimpleNamespace(input_ids=ids, labels=labels, extra={}))
    step = {"num_trained_in_step": sum(lengths) - len(lengths) + 1, "num_samples_in_step": len(lengths)}
    return collate(made, normalise="token", **step)


def test_registered_names_mean_nothing_to_transformers(monkeypatch):
    """It takes a name with one of these in it for an implementation of its own."""
    monkeypatch.setattr(flash, "find_kernel", lambda: ("flash_attn", None))
    names = [
        choose_attention(tiny_config("llama"), backend, dtype="bfloat16", device="cuda")
        for backend in BACKENDS
    ]
    names += [tree.NAME, prefix_cache.NAME, saved.COUNTED]
    assert len(set(names)) == len(BACKENDS) + 3
    for name in names:
        assert not any(part in name for part in ("flash", "sdpa", "flex_attention", "paged", "eager"))
    for name in names[: len(BACKENDS)]:
        for config in (tiny_config("llama"), WITHOUT_SDPA):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
            assert model.config._attn_implementation == name


WITHOUT_SDPA = Gemma2Config(**TINY, query_pre_attn_scalar=8, attn_logit_softcapping=None)


@pytest.mark.parametrize("name", [*BACKENDS, "tree", "shared_prefix"])
@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"position_bias": torch.zeros(4)}, "bias of positions"),
        ({"indices": torch.zeros(4)}, "sparse attention"),
        ({"is_causal": False}, "looks both ways"),
        ({"mask": torch.zeros(1, 1, 20, 20)}, "mask of the model's own"),
        ({"module": "both ways"}, "looks both ways"),
    ],
)
def test_what_an_attention_would_drop_is_refused_at_the_call(name, wanted, reason):
    with pytest.raises(ValueError, match=reason):
        call_attention(name, wanted)


def call_attention(name, wanted):
    attention = {
        "tree": partial(tree.tree_attention, tree=None),
        "shared_prefix": partial(prefix_cache.shared_prefix_attention, prefix_cache=None),
    }.get(name) or BACKENDS[name][0]
    (q, k, v), document = inputs()
    module = torch.nn.Module()
    module.is_causal = "module" not in wanted
    extras = {key: value for key, value in wanted.items() if key not in ("mask", "module")}
    return attention(module, q, k, v, wanted.get("mask"), **document, **extras)


@pytest.mark.parametrize("name", ["torch_varlen", "sdpa_docs", "tree", "shared_prefix"])
def test_a_soft_cap_is_refused_where_it_is_not_computed(name):
    with pytest.raises(ValueError, match="soft cap"):
        call_attention(name, {"softcap": 50.0})


@pytest.mark.parametrize(
    "kind", ["deepseek_v4", "flint", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "mimo_v2_flash"]
)
def test_models_with_sinks_are_known(kind):
    needs = needs_of(AutoConfig.for_model(kind), dtype="bfloat16", device="cuda")
    assert needs.sinks and all("it has no attention sinks" in lacks(needs) for _, lacks in BACKENDS.values())


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", (128, 128)),
        ("deepseek_v3", (192, 128)),
        ("deepseek_v2", (192, 128)),
        ("gemma4_text", (512, 512)),
        ("mimo_v2_flash", (192, 128)),
    ],
)
def test_head_sizes_are_those_of_the_layers(kind, sizes):
    """By default: DeepSeek-V3 rotates 64 of 192, Gemma-4's full layers have larger heads than its others."""
    needs = needs_of(AutoConfig.for_model(kind), dtype="bfloat16", device="cuda")
    assert (needs.head_size, needs.value_size) == sizes


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen", "flex"])
def test_whole_models_compute_packs_as_documents_alone(tmp_path, monkeypatch, name, kind):
    """Heads of 64 as the kernels want them; loading proves states and logits, this the loss and gradients."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    config = tiny_config(kind)
    config.head_dim = 64
    if why := BACKENDS[name][1](needs_of(config, dtype="bfloat16", device="cuda")):
        pytest.skip("; ".join(why))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_objective(recipe_for(tmp_path, attention=name)).cuda()
    results = []
    for pack in ([packed(LENGTHS)], unpacked(packed(LENGTHS))):
        model.zero_grad()
        losses = [model(batch.to("cuda"))[0] for batch in pack]
        sum(losses).backward()
        results.append((sum(losses).item(), [p.grad.float() for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=0.02)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert (ours - theirs).norm() <= 0.05 * theirs.norm().clamp(min=1e-6)


def unpacked(batch: Batch) -> list[Batch]:
    """Each document that has trained tokens as a pack of its own, with the pack's weights."""
    made, start = [], 0
    for length in batch.document_lengths:
        inside = (batch.trained_index >= start) & (batch.trained_index < start + length)
        if inside.any():
            made.append(
                replace(
                    batch,
                    input_ids=batch.input_ids[:, start : start + length],
                    position_ids=batch.position_ids[:, start : start + length],
                    cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
                    max_seqlen=length,
                    document_lengths=(length,),
                    trained_index=batch.trained_index[inside] - start,
                    targets=batch.targets[inside],
                    weights=batch.weights[inside],
                    num_tokens=length,
                )
            )
        start += length
    return made


def test_unpacked_batches_are_the_pack():
    """What the test above takes for the documents alone."""
    pack = packed(LENGTHS)
    parts = unpacked(pack)
    assert sum(part.weights.sum() for part in parts) == pytest.approx(pack.weights.sum().item())
    assert torch.equal(torch.cat([part.targets for part in parts]), pack.targets)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen", "flex"])
def test_kernels_equal_the_reference_forward_and_backward(name, window):
    """bfloat16 against float32 sdpa_docs: 8 bits of mantissa, so 2 % of the largest value."""
    attention, lacks = BACKENDS[name]
    if why := lacks(AttentionNeeds(**CUDA)):
        pytest.skip("; ".join(why))
    (q, k, v), document = inputs("cuda", torch.bfloat16, heads=4, groups=2, size=64)
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    expected, _ = sdpa_docs_attention(LAYER, *exact, None, sliding_window=window, **document)
    found, _ = attention(LAYER, q, k, v, None, sliding_window=window, **document)
    expected.square().sum().backward()
    found.float().square().sum().backward()
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip((q, k, v), exact, strict=True))]
    for ours, theirs in pairs:
        assert (ours.float() - theirs).norm() / theirs.norm() < 0.02
