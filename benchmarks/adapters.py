"""Adapters of one model as authors: memory, loading, and one pass for several adapters against a pass for each.

python -m benchmarks.adapters --size 135M
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from collm.engine.runner import ModelRunner
from collm.engine.shared_pass import shared_passes
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec
from collm.models.members import _with_one_load

SIZES: dict[str, dict[str, int]] = {
    "25M": {"hidden_size": 384, "num_hidden_layers": 8, "intermediate_size": 1024, "vocab_size": 16384},
    "135M": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "vocab_size": 49152},
}
TARGETS = {"all-linear": "all-linear", "q_proj,v_proj": ["q_proj", "v_proj"]}
"""What an adapter changes."""


def make(directory: Path, size: str, adapters: int, rank: int, targets: Any, dtype: str) -> list[ModelSpec]:
    """A model with random weights, and adapters of it."""
    heads = {"num_attention_heads": SIZES[size]["hidden_size"] // 64, "num_key_value_heads": 3}
    config = LlamaConfig(**SIZES[size], **heads, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.save_pretrained(directory / "model")
    options = {"r": rank, "target_modules": targets, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**options), adapter_name="adapter-0")
    for number in range(adapters):
        if number:
            adapted.add_adapter(f"adapter-{number}", LoraConfig(**options))
    adapted.save_pretrained(directory)
    return [ModelSpec(str(directory / "model"), adapter=str(directory / f"adapter-{n}")) for n in range(adapters)]


def size_of(models: list[Any]) -> int:
    """Bytes of the weights of several models, each tensor once."""
    weights = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for each in models for one in each.parameters()
    }
    return sum(weights.values())


def step_seconds(runners: list[ModelRunner], plain: ModelRunner, rows: int, length: int, repeats: int) -> list[float]:
    """Median CPU seconds of one step of all sequences: a pass for each adapter, one for all, one without adapters."""
    (shared,) = shared_passes(runners)
    slots = {one: [one.open() for _ in range(rows // len(runners))] for one in runners}
    for runner, own in slots.items():
        runner.extend({slot: [1 + slot] * length for slot in own})
    own_slots = [plain.open() for _ in range(rows)]
    plain.extend({slot: [1 + slot] * length for slot in own_slots})
    found: list[list[float]] = [[], [], []]
    for _ in range(repeats):
        start = time.process_time()
        for runner, own in slots.items():
            runner.extend({slot: [7] for slot in own})
        found[0].append(time.process_time() - start)
        start = time.process_time()
        shared.extend({one: ({slot: [7] for slot in own}, dict.fromkeys(own, 1)) for one, own in slots.items()})
        found[1].append(time.process_time() - start)
        start = time.process_time()
        plain.extend({slot: [7] for slot in own_slots})
        found[2].append(time.process_time() - start)
    return [statistics.median(times) for times in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="135M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--targets", choices=TARGETS, default="q_proj,v_proj", help="what adapters change")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8, help="number of adapters in memory")
    parser.add_argument("--asked", type=int, default=4, help="number of adapters that are asked in one step")
    parser.add_argument("--rows", type=int, default=16, help="number of sequences")
    parser.add_argument("--length", type=int, default=64, help="tokens in the cache of each sequence")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # CPU time is then comparable while the machine does other work
    with TemporaryDirectory() as directory, torch.inference_mode():
        kind = options.rank, TARGETS[options.targets], options.dtype
        specs = make(Path(directory), options.size, options.adapters, *kind)
        start = time.process_time()
        models: list[Any] = _with_one_load([*specs, replace(specs[0], adapter=None)])
        seconds = time.process_time() - start
        sizes = [size_of(models[:count]) for count in (1, options.adapters)]
        asked = [LanguageModel(one.eval(), name="") for one in models[: options.asked]]
        runners = [ModelRunner(one, static=False) for one in asked]
        plain = ModelRunner(LanguageModel(models[-1].eval(), name=""), static=False)
        apart, together, without = step_seconds(runners, plain, options.rows, options.length, options.repeats)
    found = {
        "options": vars(options),
        "load_s": round(seconds, 2),
        "weights_mb": [round(size / 1e6, 1) for size in sizes],
        "weights_ratio": round(sizes[1] / sizes[0], 3),
        "a_pass_each_ms": round(1e3 * apart, 1),
        "one_pass_ms": round(1e3 * together, 1),
        "without_adapters_ms": round(1e3 * without, 1),
        "speedup": round(apart / together, 2),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
