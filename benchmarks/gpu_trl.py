"""Side by side with TRL's SFTTrainer on the same card: same weights, documents, tokens a step; in turn.

TRL gets its best settings: packing with padding-free attention by the kernel that ours takes, its fused head,
liger's layers where installed, the fused optimizer, no checkpointing, no DDP. It trains bfloat16 weights with
bfloat16 moments; ours keeps float32 masters, moments and gradients, which costs it memory and traffic: each
row names both. `alpaca`: packs of documents with the given lengths, 60 % trained; `qa`: documents of 22
tokens, 4 of them trained, where a head over trained positions alone pays most. Each round times `STEPS` steps
of ours and of TRL's after warm-up; the medians of the rounds are compared.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import util
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks.gpu_clock import Case, Target
from benchmarks.gpu_step import (
    Settings,
    build,
    config_of,
    engine_step,
    make_batch,
    make_recipe,
    plain_step,
)
from benchmarks.gpu_unpatched import patched_modules, restored, without_ranks
from sftcore.model.attention import choose_attention

STEPS, WARMUP = 6, 3
QA_TOKENS, QA_TRAINED_SHARE, ALPACA_TRAINED_SHARE = 22, 4 / 22, 0.6


def cases(target: Target) -> Iterator[Case]:
    """Full fine-tuning of the 1B shape on both kinds of data, LoRA of the 8B one on one."""
    smallest = "tiny" if target.is_tiny else "llama-3.2-1b"
    wanted = [(smallest, "none", "alpaca", 3), (smallest, "none", "qa", 3)]
    if not target.is_tiny:
        wanted.append(("llama-3.1-8b", "lora", "alpaca", 2))
    engine = "zero1" if util.find_spec("deepspeed") else "plain"
    for shape, adapter, data, rounds in wanted:
        settings = Settings(
            shape=shape,
            adapter=adapter,
            num_tokens=512 if target.is_tiny else 4096,
            trained_share=QA_TRAINED_SHARE if data == "qa" else ALPACA_TRAINED_SHARE,
            deepspeed=engine,
        )
        yield Case(
            description=settings.describe("trl") | {"data": data},
            run=lambda s=settings, d=data, r=rounds: compare(target, s, d, rounds=r),
            seconds=rounds * (20 if adapter == "lora" else 9),
        )


def compare(target: Target, settings: Settings, data: str, *, rounds: int) -> dict:
    """Tokens/s, peak bytes and precision of both."""
    if not util.find_spec("trl"):
        return {"state": "not run", "reason": "trl is not installed"}
    if data == "qa":
        target = replace(target, lengths=np.full(1000, QA_TOKENS))
    rows: dict[str, list[dict]] = {"ours": [], "trl": []}
    for _ in range(rounds):
        rows["ours"].append(run_ours(target, settings))
        rows["trl"].append(run_trl(target, settings))
    ours, trl = (median(r["tokens_per_second"] for r in rows[name]) for name in ("ours", "trl"))
    return {
        "ours_tokens_per_second": ours,
        "trl_tokens_per_second": trl,
        "times_as_fast": ours / trl,
        **{f"{name}_rounds": [round(r["tokens_per_second"]) for r in of] for name, of in rows.items()},
        **{f"{name}_{key}": of[-1][key] for name, of in rows.items() for key in ("peak_bytes", "precision")},
    }


def run_ours(target: Target, settings: Settings) -> dict:
    """Median step after warm-up."""
    config = config_of(settings)
    target.reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        recipe = make_recipe(settings, folder)
        torch.manual_seed(0)
        model = build(target, config, recipe, is_slim=True)
        make_step = plain_step if settings.deepspeed == "plain" else engine_step
        step, close = make_step(model, recipe, settings)
        taken = []
        for number in range(WARMUP + STEPS):
            batch = make_batch(target, config, settings, number)
            target.synchronise()
            started = time.perf_counter()
            step(batch)
            target.synchronise()
            taken.append(time.perf_counter() - started)
        close()
    precision = "bfloat16 weights and moments" if make_step is plain_step else "float32 masters and moments"
    return {**_row(target, settings, taken), "precision": precision}


def run_trl(target: Target, settings: Settings) -> dict:
    """The same documents through SFTTrainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    config = config_of(settings)
    target.reset_peak()
    torch.manual_seed(0)
    clock = _Clock(target)
    with tempfile.TemporaryDirectory() as folder, restored(patched_modules(config)), without_ranks():
        options = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=WARMUP + STEPS,
            packing=True,
            padding_free=True,
            max_length=settings.num_tokens,
            bf16=True,
            use_cpu=target.device.type == "cpu",
            use_liger_kernel=bool(util.find_spec("liger_kernel")) and target.device.type == "cuda",
            gradient_checkpointing=False,
            learning_rate=1e-5,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        with target.device:
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=their_attention(target, config)
            )
        trainer = SFTTrainer(
            model=model,
            args=options,
            train_dataset=Dataset.from_list(packed_rows(target, config, settings)),
            processing_class=_tokenizer(Path(folder)),
            callbacks=[clock],
            peft_config=LoraConfig(r=16, target_modules="all-linear") if settings.adapter == "lora" else None,
        )
        trainer.train()
        assert not isinstance(trainer.model_wrapped, DistributedDataParallel)
        precision = _precision_of(trainer.model, trainer.optimizer)
        trainer.accelerator.free_memory()
    return {**_row(target, settings, clock.seconds), "precision": precision}


def _precision_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of the trained weights and of what the optimizer keeps of each."""
    weights = {str(p.dtype) for p in model.parameters() if p.requires_grad}
    kept = {str(t.dtype) for of in optimizer.state.values() for t in of.values() if t.ndim}
    named = (" and ".join(sorted(found)).replace("torch.", "") for found in (weights, kept))
    return "{} weights, {} moments".format(*named)


def packed_rows(target: Target, config: Any, settings: Settings) -> list[dict]:
    """Our packs in the columns of a data set that TRL has packed."""
    rows = []
    for number in range(WARMUP + STEPS):
        batch = make_batch(target, config, settings, number)
        labels = np.full(batch.num_tokens, -100)
        index = batch.trained_index.cpu().numpy() + 1  # theirs are shifted inside the model
        labels[index] = batch.targets.cpu().numpy()
        ids = batch.input_ids[0].cpu().tolist()
        rows.append({"input_ids": ids, "labels": labels.tolist(), "seq_lengths": [*batch.document_lengths]})
    return rows


def their_attention(target: Target, config: Any) -> str:
    """The kernel that ours takes: TRL's padding-free collator gives it the documents' borders, as ours does.

    On a CPU ours wants document lengths, which TRL's collator has not.
    """
    if target.device.type != "cuda":
        return "sdpa"
    return choose_attention(config, "auto", dtype="bfloat16", device="cuda")


def _tokenizer(folder: Path) -> Any:
    """TRL wants one; nothing is tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def _row(target: Target, settings: Settings, taken: list[float]) -> dict:
    seconds = median(taken[WARMUP:])
    return {"tokens_per_second": settings.num_tokens / seconds, "peak_bytes": target.peak_bytes()}


class _Clock(TrainerCallback):
    """Wall time of each optimizer step, the device waited for."""

    def __init__(self, target: Target) -> None:
        self.target, self.seconds = target, []

    def on_step_begin(self, *_, **__) -> None:
        self.target.synchronise()
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.target.synchronise()
        self.seconds.append(time.perf_counter() - self.started)
