"""What the runs of this folder cost, by formulas: tokens, FLOPs, hours, memory. Nothing here was measured.

python -m recipes.paper.estimate          # the tables of the README
python -m recipes.paper.estimate --json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent

GPUS = 4
PEAK_FLOPS = 312e12
"""Of one A100, bf16, dense: NVIDIA's data sheet."""
SCORING_UTILISATION, TRAINING_UTILISATION = 0.5, 0.4
"""Assumptions: shares of the peak that scoring and training reach."""


@dataclass(frozen=True)
class Shape:
    """A Llama: attention with (grouped) keys and values, a gated MLP, embedding and output layer apart.

    Attributes:
        layers, width: L and H.
        inner: width of the MLP.
        kv_width: of keys, and of values.
        vocab: V.
    """

    layers: int
    width: int
    inner: int
    kv_width: int
    vocab: int = 32000

    @property
    def parameters(self) -> int:
        """Weights of the layers, their two norms included, the last norm, embedding and output layer."""
        attention = 2 * self.width**2 + 2 * self.width * self.kv_width
        layer = attention + 3 * self.width * self.inner + 2 * self.width
        return self.layers * layer + self.width + 2 * self.vocab * self.width


# Shapes: the models' config.json. Meditron-70B and Llemma-34B go on from Llama-2-70B and Code Llama 34B and are taken
# to have their shapes; the few rows that Meditron adds to its vocabulary are left out.
LLAMA_70B = Shape(80, 8192, 28672, 1024)
SHAPES = {
    "Llama-2-7b-hf": Shape(32, 4096, 11008, 4096),
    "Llama-2-70b-hf": LLAMA_70B,
    "meditron-70b": LLAMA_70B,
    "llemma_34b": Shape(48, 8192, 22016, 1024),
}
"""By the last part of a model's name."""


@dataclass(frozen=True)
class Data:
    """A training set.

    Attributes:
        rows: of the published training split.
        held_out: of these, for calibration.
        tokens: of a row on average, prompt, template and completion; an assumption.
        targets: of these, what is learned; an assumption.
    """

    rows: int
    held_out: int
    tokens: int
    targets: int


DATA = {
    # The set's card on the Hub: 326,154 rows, 1,239,293,363 bytes. So 3,800 bytes a conversation, or 950 tokens of 4
    # bytes, of which 700 are assumed to be left at max_length 2048.
    "tulu": Data(326_154, 200, tokens=700, targets=500),
    # Lines of the published train.jsonl, with 235 bytes of question and 288 of answer on average; digits and the
    # calculator's marks are a token each.
    "gsm8k": Data(7_473, 200, tokens=220, targets=140),
    # 7,500 rows: arXiv 2103.03874. The same problems are on the Hub in 7 subjects, of each of which 30 are held out.
    "math": Data(7_500, 200, tokens=320, targets=220),
    # Task 11b, training11b.json: the number of questions is an assumption too.
    "bioasq": Data(4_719, 200, tokens=170, targets=130),
}


def forward_flops(shape: Shape, examples: int, tokens: int) -> int:
    """2 N T for the weights and 4 L H T^2 for attention (scores and their sum, mask not used) per example of T tokens.

    N counts the output layer at every token, though it reads the targets alone.
    """
    weights = 2 * shape.parameters * tokens
    attention = 4 * shape.layers * shape.width * tokens**2
    return examples * (weights + attention)


def training_flops(shape: Shape, examples: int, tokens: int, epochs: int) -> int:
    """A backward pass costs two forward ones: 6 N T + 12 L H T^2. What checkpointing computes twice is not counted."""
    return 3 * epochs * forward_flops(shape, examples, tokens)


def hours(flops: float, utilisation: float) -> float:
    """On all GPUs."""
    return flops / (GPUS * PEAK_FLOPS * utilisation) / 3600


def state_bytes(parameters: int, stage: int) -> dict[str, float]:
    """Per GPU, of ZeRO stage 2 or 3: bf16 weights and gradients; fp32 weights and AdamW's two moments as optimizer.

    Stage 2 shares gradients and optimizer among the GPUs, stage 3 the weights too.
    """
    return {
        "weights": 2 * parameters / (GPUS if stage == 3 else 1),
        "gradients": 2 * parameters / GPUS,
        "optimizer": 12 * parameters / GPUS,
    }


def activation_bytes(shape: Shape, batch: int, length: int) -> int:
    """Roughly, with activation checkpointing: the input of every layer, and one layer's inner values, all in bf16.

    Of a layer's inner values 8 are as wide as the model (norms, queries, keys, values, attention, residuals) and 4 as
    wide as the MLP. Attention is taken not to keep its (T, T) scores.
    """
    return 2 * batch * length * (shape.layers * shape.width + 8 * shape.width + 4 * shape.inner)


def loss_bytes(shape: Shape, batch: int, length: int) -> int:
    """Of `collm.training.fused`, if every position is a target; nothing has the size of all logits, B x T x V.

    Hidden states and their gradient, 2 bytes a number each; a chunk of logits with no more numbers than these, in bf16,
    as fp32 probabilities, and their gradient in bf16; the output layer's gradient as an fp32 sum and as a bf16 term.
    """
    hidden = batch * length * shape.width
    return (2 + 2) * hidden + (2 + 4 + 2) * hidden + (4 + 2) * shape.vocab * shape.width


def memory(shape: Shape, batch: int, length: int, stage: int) -> dict[str, float]:
    """Bytes per GPU while training, for a batch of the greatest length."""
    parts = {
        **state_bytes(shape.parameters, stage),
        "activations": activation_bytes(shape, batch, length),
        "loss": loss_bytes(shape, batch, length),
    }
    return {**parts, "total": sum(parts.values())}


@dataclass(frozen=True)
class Estimate:
    """One run. `memory_bytes`: ZeRO stage -> what -> bytes per GPU."""

    run: str
    base: str
    assistant: str
    examples: int
    tokens: int
    targets: int
    steps: int
    scoring_flops: int
    training_flops: int
    scoring_hours: float
    training_hours: float
    assistant_weights_bytes: int
    checkpoint_bytes: int
    memory_bytes: Mapping[str, Mapping[str, float]]


def estimate(run: str) -> Estimate:
    """A run of this folder, as its configuration says."""
    config: dict[str, Any] = yaml.safe_load((FOLDER / f"{run}.yaml").read_text(encoding="utf-8"))
    base, assistant = (SHAPES[config[name].rpartition("/")[2]] for name in ("base", "assistant"))
    data, epochs = DATA[run], config["num_train_epochs"]
    batch, length = config["per_device_train_batch_size"], config["max_length"]
    examples = data.rows - data.held_out
    scoring = sum(forward_flops(shape, examples, data.tokens) for shape in (base, assistant))
    training = training_flops(base, examples, data.tokens, epochs)
    return Estimate(
        run=run,
        base=config["base"],
        assistant=config["assistant"],
        examples=examples,
        tokens=examples * data.tokens,
        targets=examples * data.targets,
        steps=epochs * math.ceil(examples / (batch * config["gradient_accumulation_steps"] * GPUS)),
        scoring_flops=scoring,
        training_flops=training,
        scoring_hours=hours(scoring, SCORING_UTILISATION),
        training_hours=hours(training, TRAINING_UTILISATION),
        assistant_weights_bytes=2 * assistant.parameters,
        checkpoint_bytes=(2 + 12) * base.parameters,
        memory_bytes={f"zero{stage}": memory(base, batch, length, stage) for stage in (2, 3)},
    )


def tables(estimates: Sequence[Estimate]) -> str:
    """Markdown: what each run costs, and the memory per GPU, in which the runs do not differ."""
    costs = [
        [
            one.run,
            Path(one.assistant).name,
            f"{one.examples:,}",
            f"{one.tokens / 1e6:.1f} ({one.targets / 1e6:.1f})",
            str(one.steps),
            f"{one.scoring_flops / 1e18:.2f}",
            f"{one.training_flops / 1e18:.2f}",
            f"{one.scoring_hours:.2f}",
            f"{one.training_hours:.2f}",
            _gb(one.assistant_weights_bytes),
        ]
        for one in estimates
    ]
    head = [
        "run",
        "assistant",
        "examples",
        "million tokens (targets)",
        "steps",
        "scoring, EFLOP",
        "training, EFLOP",
        "scoring, hours",
        "training, hours",
        "assistant's weights, GB",
    ]
    (used,) = {json.dumps(one.memory_bytes) for one in estimates}
    stages = {f"ZeRO-{name[-1]}": parts for name, parts in json.loads(used).items()}
    (checkpoint,) = {one.checkpoint_bytes for one in estimates}
    states = [[stage, *map(_gb, parts.values()), _gb(checkpoint)] for stage, parts in stages.items()]
    names = ["GB per GPU", *next(iter(stages.values())), "a checkpoint on disk"]
    return _markdown(head, costs) + "\n" + _markdown(names, states)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.paper.estimate", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="all numbers, without rounding")
    estimates = [estimate(run) for run in DATA]
    if parser.parse_args(arguments).json:
        print(json.dumps([asdict(one) for one in estimates], indent=2))
    else:
        print(tables(estimates), end="")


if __name__ == "__main__":
    main()
