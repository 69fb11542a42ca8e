"""TRL's side of benchmarks/train.py: MODEL ITEMS SAMPLES_PER_STEP STEPS DTYPE MODE -> one line of JSON.

Runs in an environment of its own (torch, trl, transformers). MODE is padded or packed, with weights and
arithmetic in bfloat16 (the fastest here), or float32: padded, with TRL's default, float32 weights under
bfloat16 autocast, the precision that our master weights give; with DTYPE float32 nothing is in bfloat16.
Sequential order; loss on completions only.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.measure import peak_resident_bytes, versions


class Clock(TrainerCallback):
    """Wall time of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(time.perf_counter() - self.started)


class InOrder(SFTTrainer):
    """Takes the samples as they come."""

    def _get_train_sampler(self, *_, **__):
        return SequentialSampler(self.train_dataset)


def main() -> None:
    """Train and time."""
    model_path, items, per_step, steps, mode = (
        sys.argv[1],
        sys.argv[2],
        int(sys.argv[3]),
        int(sys.argv[4]),
        sys.argv[6],
    )
    with open(items) as handle:
        rows = [json.loads(line) for line in handle]
    packed, is_exact = mode == "packed", sys.argv[5] == "float32"
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=scratch,
            per_device_train_batch_size=1 if packed else per_step,
            max_steps=steps + 1 if not packed else -1,
            num_train_epochs=1,
            packing=packed,
            max_length=tokens_per_step(model_path, rows, per_step) if packed else 4096,
            completion_only_loss=True,
            bf16=not is_exact,
            use_cpu=True,
            gradient_checkpointing=False,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        dtype = torch.float32 if is_exact or mode == "float32" else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        clock = Clock()
        trainer = InOrder(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        json.dumps(
            {
                "steps": clock.seconds[1:],
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "peak_resident_bytes": peak_resident_bytes(),
                "versions": versions("torch", "transformers", "trl"),
            }
        )
    )


def tokens_per_step(model_path: str, rows: list[dict], per_step: int) -> int:
    """Length of a pack that holds `per_step` samples on average, so that packed steps do the same work."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    counts = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows]
    return round(sum(counts) / len(counts) * per_step)


if __name__ == "__main__":
    main()
