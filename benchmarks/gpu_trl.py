"""Side by side with TRL's SFTTrainer on the same card: same weights, documents, tokens a step; in turn.

TRL gets its best settings: packing with padding-free attention, bfloat16, liger kernels where installed, the
fused optimizer, no checkpointing. `alpaca`: packs of documents with the given lengths, 60 % trained; `qa`:
documents of 22 tokens, 4 of them trained, where a head over trained positions alone pays most. Each round
times `STEPS` steps of ours and of TRL's after warm-up; the medians of the rounds are compared.
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
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks.gpu_clock import Case, Target
from benchmarks.gpu_step import (
    SHAPES,
    TINY,
    Settings,
    build,
    engine_step,
    make_batch,
    make_recipe,
    plain_step,
)

ROUNDS, STEPS, WARMUP = 3, 6, 3
QA_TOKENS, QA_TRAINED_SHARE, ALPACA_TRAINED_SHARE = 22, 4 / 22, 0.6


def cases(target: Target) -> Iterator[Case]:
    """Two kinds of data; full fine-tuning of the 1B shape and LoRA of the 8B one."""
    shapes = (("tiny", "none"),) if target.is_tiny else (("llama-3.2-1b", "none"), ("llama-3.1-8b", "lora"))
    engine = "zero1" if util.find_spec("deepspeed") else "plain"
    for shape, adapter in shapes:
        for data in ("alpaca", "qa"):
            settings = Settings(
                shape=shape,
                adapter=adapter,
                num_tokens=512 if target.is_tiny else 4096,
                trained_share=QA_TRAINED_SHARE if data == "qa" else ALPACA_TRAINED_SHARE,
                deepspeed=engine,
            )
            yield Case(
                description=settings.describe("trl") | {"data": data},
                run=lambda s=settings, d=data: compare(target, s, d),
                seconds=90,
            )


def compare(target: Target, settings: Settings, data: str) -> dict:
    """Tokens/s and peak bytes of both."""
    if not util.find_spec("trl"):
        return {"state": "not run", "reason": "trl is not installed"}
    if data == "qa":
        target = replace(target, lengths=np.full(1000, QA_TOKENS))
    rows: dict[str, list[dict]] = {"ours": [], "trl": []}
    for _ in range(ROUNDS):
        rows["ours"].append(run_ours(target, settings))
        rows["trl"].append(run_trl(target, settings))
    ours, trl = (median(r["tokens_per_second"] for r in rows[name]) for name in ("ours", "trl"))
    return {
        "ours_tokens_per_second": ours,
        "trl_tokens_per_second": trl,
        "times_as_fast": ours / trl,
        **{f"{name}_rounds": [round(r["tokens_per_second"]) for r in of] for name, of in rows.items()},
        **{f"{name}_peak_bytes": of[-1]["peak_bytes"] for name, of in rows.items()},
    }


def run_ours(target: Target, settings: Settings) -> dict:
    """Median step after warm-up."""
    config = TINY if settings.shape == "tiny" else SHAPES[settings.shape]
    target.reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        recipe = make_recipe(settings, folder)
        torch.manual_seed(0)
        model = build(target, config, recipe)
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
    return _row(target, settings, taken)


def run_trl(target: Target, settings: Settings) -> dict:
    """The same documents through SFTTrainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    config = TINY if settings.shape == "tiny" else SHAPES[settings.shape]
    target.reset_peak()
    torch.manual_seed(0)
    clock = _Clock(target)
    with tempfile.TemporaryDirectory() as folder:
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
                config, dtype=torch.bfloat16, attn_implementation=_their_attention(target)
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
    return _row(target, settings, clock.seconds)


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


def _their_attention(target: Target) -> str:
    """The fastest that TRL's padding-free packing takes here."""
    if target.device.type == "cuda" and util.find_spec("flash_attn"):
        return "flash_attention_2"
    return "sdpa"


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
