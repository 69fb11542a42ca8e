"""TRL's preparation of the same rows, as its SFTTrainer runs it; needs an environment with trl 1.16.

In: a prompt-completion JSONL file, a fresh cache folder. Out: one line of JSON with seconds and tokens.
Invariant: what is timed is `load_dataset` and `SFTTrainer._prepare_dataset`, two processes, nothing cached.
Trade-off: the method is called without a trainer around it (it needs three attributes): no model is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace


def main() -> None:
    """Prepare once and print the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--role")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    os.environ["HF_DATASETS_CACHE"] = str(options.cache)
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(".cache/models/smollm2-135m")
    arguments = SFTConfig(
        output_dir=str(options.cache / "out"),
        max_length=4096,
        dataset_num_proc=len(os.sched_getaffinity(0)),
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    started = time.perf_counter()
    rows = load_dataset("json", data_files=str(options.file), split="train", cache_dir=str(options.cache))
    prepared = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, arguments, False, None, "train")
    seconds = time.perf_counter() - started
    num_tokens = sum(map(len, prepared["input_ids"]))
    print(json.dumps({"seconds": seconds, "num_tokens": num_tokens, "trl": trl.__version__}))


if __name__ == "__main__":
    main()
