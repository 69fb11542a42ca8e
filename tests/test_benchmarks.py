"""The GPU benchmark runs whole on small shapes, so that a card's minutes aren't spent on its mistakes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama import modeling_llama

from benchmarks import gpu, gpu_kernels, gpu_needs, gpu_step, gpu_trl
from benchmarks.gpu_clock import Case, Target
from benchmarks.gpu_sections import chosen_cases, environment, kept_rows, measure, read_lengths, take_turns
from benchmarks.gpu_unpatched import without_ranks
from benchmarks.results_page import page
from sftcore.model.attention import flex

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_with_small_shapes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert not [row for row in report["rows"] if row.get("reason") == "no time was left"]
    states = {(row["section"], row.get("backend", row.get("head"))): row["state"] for row in report["rows"]}
    assert states["attention", "sdpa_docs"] == "ok"
    assert states["attention", "flash_attn"] == "refused"
    assert states["head", "ours"] == states["head", "full logits"] == "ok"
    steps = [row for row in report["rows"] if row["section"] in ("step", "lever")]
    assert {row["deepspeed"] for row in steps} == {"zero1", "zero2", "zero3", "plain"}
    assert not [row for row in report["rows"] if row["state"] == "failed"]
    assert all(row["tokens_per_second"] > 0 for row in steps if row["state"] == "ok")
    text = page(report, None)
    assert "| zero3 |" in text and "refused" in text and "in this loop only" in text
    again = subprocess.run([*command, "--only", "limit"], env=environment, capture_output=True, timeout=300)
    assert again.returncode == 0, again.stderr[-2000:]
    anew = json.loads((tmp_path / "gpu.json").read_text())
    assert anew["environment"] == report["environment"] and len(anew["rows"]) == len(report["rows"])


def test_what_was_not_measured_has_no_numbers_on_the_page():
    text = page(None, None)
    assert "Not measured yet" in text and "python -m benchmarks.gpu" in text
    assert not [line for line in text.splitlines() if line.startswith("|") and any(c.isdigit() for c in line)]


def target(device: str = "cuda", *, is_tiny: bool = False) -> Target:
    return Target(device=torch.device(device), is_tiny=is_tiny, lengths=read_lengths(None))


def test_a_whole_run_takes_less_than_nine_minutes_by_arithmetic(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    groups = chosen_cases(target(), None)
    names = [group[0].description["section"] for group in groups]
    assert names == ["limit", "head", "step", "trl", "lever", "attention", "step"]
    assert [case.description["deepspeed"] for case in groups[-1]] == ["zero3"]
    assert "zero3" not in {case.description.get("deepspeed") for group in groups[:-1] for case in group}
    imports = 20
    assert imports + sum(case.seconds for group in groups for case in group) < 60 * gpu.parse().minutes < 540
    backends = Counter(case.description["backend"] for case in groups[5])
    assert 0 < backends[flex.NAME] <= 2 < min(n for name, n in backends.items() if name != flex.NAME)


def test_windows_cut_documents_and_one_is_long():
    documents = {gpu_kernels.DRAWN: max(target().documents(4096)), gpu_kernels.ONE: 16_384}
    windows = [(packed, window) for packed, _, _, window in gpu_kernels.PACKS if window]
    assert len(windows) == 2 and all(window < documents[packed] / 2 for packed, window in windows)


def case(section: str, seconds: float) -> Case:
    return Case(description={"section": section}, run=dict, seconds=seconds)


@pytest.mark.parametrize(
    ("takes", "ran"),
    [
        (10, "aaaaa bbb c"),  # as estimated
        (5, "aaaaa bbb c"),
        (25, "aaa b c"),  # a's share is over after two and a half; every section has a row
        (200, "a"),
    ],
)
def test_slow_cases_take_no_other_sections_time(takes, ran):
    now = [1000.0]
    groups = [[case("a", 10)] * 5, [case("b", 10)] * 3, [case("c", 10)]]
    taken = []
    for each in take_turns(groups, seconds=110, started=1000, clock=lambda: now[0]):
        taken.append(each.description["section"])
        now[0] += takes
    assert taken == list(ran.replace(" ", ""))


def test_time_that_is_left_goes_to_cases_that_were_passed_over():
    now = [0.0]
    taken = []
    for each in take_turns(
        [[case("a", 10)] * 3, [case("b", 60)]], seconds=100, started=0, clock=lambda: now[0]
    ):
        taken.append(each.description["section"])
        now[0] += {"a": 25, "b": 1}[taken[-1]]
    assert taken == ["a", "b", "a", "a"]


def fail(error: Exception) -> dict:
    raise error


def test_failures_are_told_apart():
    assert measure(lambda: fail(AssertionError())) == {"state": "failed", "error": "AssertionError"}
    assert measure(lambda: fail(ValueError("a\nb")))["error"] == "ValueError: a"
    absent = measure(lambda: importlib.import_module("not_there"))
    assert absent == {"state": "not run", "reason": "not_there is not installed"}


def test_errors_that_are_no_numbers_are_wrong(monkeypatch):
    small = target("cpu", is_tiny=True)
    described = {case.description["head"]: case.description for case in gpu_kernels.head_cases(small)}
    assert gpu_kernels.measure_head(small, described["ours"])["state"] == "ok"
    ours = gpu_kernels.HEADS["ours"]
    monkeypatch.setitem(gpu_kernels.HEADS, "ours", lambda h, w, t: ours(h, w * float("nan"), t))
    assert gpu_kernels.measure_head(small, described["ours"])["state"] == "wrong"
    attention = next(
        c.description
        for c in gpu_kernels.attention_cases(small)
        if not gpu_kernels.measure_attention(small, c.description).get("reason")
    )
    exact, lacks = gpu_kernels.BACKENDS[attention["backend"]]

    def not_a_number(module, q, k, v, mask, **arguments):
        out, _ = exact(module, q, k, v, mask, **arguments)
        return out * torch.where(torch.arange(out.shape[1]) > 3, 1.0, float("nan"))[:, None, None], None

    monkeypatch.setitem(gpu_kernels.BACKENDS, attention["backend"], (not_a_number, lacks))
    assert gpu_kernels.measure_attention(small, attention)["state"] == "wrong"


def test_a_torch_without_the_fused_head_is_no_failure(monkeypatch):
    small = target("cpu", is_tiny=True)
    described = {case.description["head"]: case.description for case in gpu_kernels.head_cases(small)}
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    found = gpu_kernels.measure_head(small, described["torch"])
    assert found["state"] == "not run" and "needs torch >= 2.13" in found["reason"]


def test_ligers_row_is_what_the_product_runs(monkeypatch):
    called = []
    monkeypatch.setattr(gpu_kernels, "liger_cross_entropy", lambda *a, **o: called.append(o) or "loss")
    assert gpu_kernels.HEADS["liger"](torch.ones(2, 3), torch.ones(4, 3), torch.tensor([1, 2])) == "loss"
    assert called[0]["weights"].tolist() == [0.5, 0.5] and "liger mean" in gpu_kernels.HEADS


def test_sections_that_are_not_run_again_keep_their_rows(tmp_path, capsys):
    small = target("cpu", is_tiny=True)
    about, file = environment(small, None), tmp_path / "gpu.json"
    assert about["shapes"] == "tiny" and "trl" in {*about, *about["absent"]}
    assert kept_rows(file, about, {"head"}) == []
    rows = [{"section": "head"}, {"section": "step"}, {"section": "trl"}]
    file.write_text(json.dumps({"environment": about, "rows": rows}))
    assert kept_rows(file, about, {"head", "trl"}) == [{"section": "step"}]
    assert kept_rows(file, about | {"torch": "2.0"}, {"head"}) == []
    assert "begun anew" in capsys.readouterr().out


def test_missing_packages_are_one_message_with_commands(monkeypatch, capsys):
    """Also what deepspeed lacks, which transformers imports wherever it sees it."""
    absent = {"pydantic", "orjson", "trl", "flash-attn", "hjson"}
    look = gpu_needs.missing

    def missing(without: set[str]) -> tuple[list[str], list[str]]:
        return look(
            version=lambda name: None if name in without else "1",
            requirements=lambda name: ["torch", "hjson"] if name == "deepspeed" else ["torch"],
        )

    assert missing(absent) == (["pydantic", "orjson", "hjson"], ["trl", "flash-attn"])
    assert missing({"deepspeed", "hjson"}) == ([], ["deepspeed"])
    monkeypatch.setattr(gpu_needs, "missing", lambda: missing(absent))
    monkeypatch.setattr(sys, "argv", ["gpu"])
    message = r"(?s)can't start without: pydantic, orjson, hjson\n.*trl \(no rows"
    with pytest.raises(SystemExit, match=message) as said:
        gpu.main()
    assert "pip wheel --no-deps --wheel-dir wheels pydantic orjson hjson trl\n" in str(said.value)
    monkeypatch.setattr(gpu_needs, "missing", lambda: ([], ["flash-attn"]))
    gpu_needs.check_packages()
    assert "torch_varlen takes its place" in capsys.readouterr().out


def test_this_environment_has_what_the_benchmark_needs():
    assert gpu_needs.missing()[0] == [] and "hjson" in gpu_needs.requirements_of("deepspeed")


def patch_as_liger(model, **options):
    """What liger-kernel 0.8.5's instance patch does to more than the instance."""
    assert options == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin, **_: (q, k)
    modeling_llama.LlamaMLP = modeling_llama.LlamaRMSNorm = torch.nn.Identity
    modeling_llama.LlamaForCausalLM.forward = None
    torch.nn.functional.cross_entropy = None


def test_levers_leave_the_models_module_as_it_was(monkeypatch):
    owners = (modeling_llama, modeling_llama.LlamaForCausalLM, torch.nn.functional)
    before = [dict(vars(owner)) for owner in owners]
    patches = SimpleNamespace(_apply_liger_kernel_to_instance=patch_as_liger)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=patches))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", patches)
    seen = []
    plain = gpu_step.plain_step

    def spy(model, recipe, settings):
        made = plain(model, recipe, settings)
        seen.append(modeling_llama.LlamaMLP)
        return made

    monkeypatch.setattr(gpu_step, "plain_step", spy)
    settings = gpu_step.Settings(
        shape="tiny", num_tokens=64, deepspeed="plain", levers=("fused layers",), trained_share=1.0
    )
    assert gpu_step.measure_step(target("cpu", is_tiny=True), settings)["tokens_per_second"] > 0
    assert seen == [torch.nn.Identity]
    assert [dict(vars(owner)) for owner in owners] == before


def test_trl_gets_the_attention_that_ours_takes(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_trl, "choose_attention", lambda *a, **o: asked.append((a, o)) or "registered")
    assert gpu_trl.their_attention(target("cuda"), gpu_step.TINY) == "registered"
    assert asked == [((gpu_step.TINY, "auto"), {"dtype": "bfloat16", "device": "cuda"})]


def test_trl_is_no_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with without_ranks():
        assert "LOCAL_RANK" not in os.environ
    assert os.environ["LOCAL_RANK"] == "0"
