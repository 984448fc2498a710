"""Cost estimates of the runs of this folder, by formulas: tokens, FLOPs, hours and memory. Nothing here was measured.

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
"""Peak of one A100 in dense bf16, from NVIDIA's data sheet."""
SCORING_UTILISATION, TRAINING_UTILISATION = 0.5, 0.4
"""Assumed shares of the peak that scoring and training reach."""


@dataclass(frozen=True)
class Shape:
    """Shape of a Llama: attention with grouped keys and values, a gated MLP, separate embedding and output layer.

    Attributes:
        layers, width: L and H.
        inner: width of the MLP.
        kv_width: width of the keys, and of the values.
        vocab: V.
    """

    layers: int
    width: int
    inner: int
    kv_width: int
    vocab: int = 32000

    @property
    def parameters(self) -> int:
        """Number of weights: all layers with their two norms, the last norm, embedding and output layer."""
        attention = 2 * self.width**2 + 2 * self.width * self.kv_width
        layer = attention + 3 * self.width * self.inner + 2 * self.width
        return self.layers * layer + self.width + 2 * self.vocab * self.width


# Source of the shapes: each model's config.json. Meditron-70B and Llemma-34B continue Llama-2-70B and Code Llama 34B,
# and are assumed to have their shapes. The few rows that Meditron adds to its vocabulary are ignored.
LLAMA_70B = Shape(80, 8192, 28672, 1024)
SHAPES = {
    "Llama-2-7b-hf": Shape(32, 4096, 11008, 4096),
    "Llama-2-70b-hf": LLAMA_70B,
    "meditron-70b": LLAMA_70B,
    "llemma_34b": Shape(48, 8192, 22016, 1024),
}
"""Shapes by the last part of a model's name."""


@dataclass(frozen=True)
class Data:
    """A training set.

    Attributes:
        rows: number of rows in the published training split.
        held_out: number of these rows that are held out for calibration.
        tokens: mean number of tokens of a row: prompt, template and completion. An assumption.
        targets: mean number of these tokens that are learned. An assumption.
    """

    rows: int
    held_out: int
    tokens: int
    targets: int


DATA = {
    # From the data set's card on the Hub: 326,154 rows, 1,239,293,363 bytes. That is 3,800 bytes per conversation, or
    # 950 tokens of 4 bytes. It is assumed that 700 of them remain at max_length 2048.
    "tulu": Data(326_154, 200, tokens=700, targets=500),
    # The number of lines of the published train.jsonl. Questions have 235 bytes and answers 288 on average. Each digit
    # and each calculator mark is one token.
    "gsm8k": Data(7_473, 200, tokens=220, targets=140),
    # 7,500 rows: arXiv 2103.03874. The Hub has the same problems in 7 subjects, and 30 of each subject are held out.
    "math": Data(7_500, 200, tokens=320, targets=220),
    # Task 11b, training11b.json. The number of questions is also an assumption.
    "bioasq": Data(4_719, 200, tokens=170, targets=130),
}


def forward_flops(shape: Shape, examples: int, tokens: int) -> int:
    """FLOPs of a forward pass: 2 N T for the weights and 4 L H T^2 for attention, per example of T tokens.

    Attention counts the scores and their weighted sum, without savings from the mask. N counts the output layer at
    every token, although only the targets need it.
    """
    weights = 2 * shape.parameters * tokens
    attention = 4 * shape.layers * shape.width * tokens**2
    return examples * (weights + attention)


def training_flops(shape: Shape, examples: int, tokens: int, epochs: int) -> int:
    """FLOPs of training, 6 N T + 12 L H T^2, because a backward pass costs two forward ones.

    The additional forward pass of activation checkpointing is not counted.
    """
    return 3 * epochs * forward_flops(shape, examples, tokens)


def hours(flops: float, utilisation: float) -> float:
    """Hours on all GPUs."""
    return flops / (GPUS * PEAK_FLOPS * utilisation) / 3600


def state_bytes(parameters: int, stage: int) -> dict[str, float]:
    """Bytes per GPU of weights, gradients and optimizer for ZeRO stage 2 or 3.

    Weights and gradients are in bf16. The optimizer holds fp32 weights and the two moments of AdamW. Stage 2 partitions
    gradients and optimizer over the GPUs. Stage 3 also partitions the weights.
    """
    return {
        "weights": 2 * parameters / (GPUS if stage == 3 else 1),
        "gradients": 2 * parameters / GPUS,
        "optimizer": 12 * parameters / GPUS,
    }


def activation_bytes(shape: Shape, batch: int, length: int) -> int:
    """Approximate bytes of activations with checkpointing: the input of every layer and the inner values of one layer,
    in bf16.

    8 of a layer's inner values are as wide as the model (norms, queries, keys, values, attention, residuals), and 4 are
    as wide as the MLP. It is assumed that attention does not store its (T, T) scores.
    """
    return 2 * batch * length * (shape.layers * shape.width + 8 * shape.width + 4 * shape.inner)


def loss_bytes(shape: Shape, batch: int, length: int) -> int:
    """Bytes of `collm.training.fused` if every position is a target. Nothing has the size of all logits, B x T x V.

    The parts are the hidden states and their gradient, with 2 bytes per number each; a chunk of logits with no more
    numbers than these, in bf16, as fp32 probabilities, and their gradient in bf16; and the gradient of the output
    layer, as an fp32 sum and as a bf16 term.
    """
    hidden = batch * length * shape.width
    return (2 + 2) * hidden + (2 + 4 + 2) * hidden + (4 + 2) * shape.vocab * shape.width


def memory(shape: Shape, batch: int, length: int, stage: int) -> dict[str, float]:
    """Bytes per GPU during training, for a batch of the greatest length."""
    parts = {
        **state_bytes(shape.parameters, stage),
        "activations": activation_bytes(shape, batch, length),
        "loss": loss_bytes(shape, batch, length),
    }
    return {**parts, "total": sum(parts.values())}


@dataclass(frozen=True)
class Estimate:
    """The costs of one run.

    Attributes:
        memory_bytes: ZeRO stage -> part -> bytes per GPU.
    """

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
    """Estimate the costs of a run from its configuration."""
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
    """Markdown tables: the cost of each run, and the memory per GPU, which is the same for all runs."""
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
    (memory_json,) = {json.dumps(one.memory_bytes) for one in estimates}
    stages = {f"ZeRO-{name[-1]}": parts for name, parts in json.loads(memory_json).items()}
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
