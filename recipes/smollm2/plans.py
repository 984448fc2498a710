"""Sizes of runs, for two cores or one GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        train_rows, validation_rows: number of rows from GSM8K's training split; None for all remaining rows.
        test_rows: number of test rows that are read with their solutions.
        written_rows: number of these rows for which solutions are generated.
        method: how base and head are trained: "lora" or "full".
        learning_rate: learning rate of the base.
        epochs: number of passes over the training rows.
        batch_size: number of rows per update.
        max_length: limit for a row, in tokens.
        max_tokens: limit for a solution, in tokens.
        max_batch: number of solutions generated at once.
        device, dtype: device and dtype of the model.
        bf16: whether training computes in bfloat16.
    """

    train_rows: int | None
    validation_rows: int
    test_rows: int
    written_rows: int
    method: str
    learning_rate: float
    epochs: float
    batch_size: int
    max_length: int
    max_tokens: int
    max_batch: int
    device: str
    dtype: str
    bf16: bool


PLANS = {
    "cpu": Plan(240, 16, 120, 48, "lora", 1e-3, 1.0, 8, 384, 160, 24, "cpu", "float32", False),
    "gpu": Plan(None, 200, 1319, 1319, "full", 1.5e-4, 2.0, 32, 1024, 256, 512, "cuda", "bfloat16", True),
}


@dataclass(frozen=True)
class PairPlan(Plan):
    """Sizes of the run with two language models. From `train_rows` they learn to collaborate.

    No row is in more than one of the three sets of training rows.

    Attributes:
        layers: number of layers of the base, which are the first ones of the whole model.
        heal_rows: number of solutions from which the base learns to work without the other layers.
        heal_texts: number of paragraphs of Python's documentation for the same purpose.
        heal_learning_rate: learning rate of this training.
        expert_rows: number of solutions from which the assistant learns.
        deferral_cost: nats per decision to defer, in the trainings with a cost.
    """

    layers: int
    heal_rows: int
    heal_texts: int
    heal_learning_rate: float
    expert_rows: int
    deferral_cost: float = 1.0


PAIR_PLANS = {
    "cpu": PairPlan(
        240, 8, 120, 32, "full", 1e-4, 1.0, 8, 384, 160, 16, "cpu", "float32", False, 10, 640, 320, 5e-4, 200
    ),
    "cpu-deep": PairPlan(
        240, 8, 120, 0, "full", 1e-4, 1.0, 8, 384, 160, 16, "cpu", "float32", False, 24, 240, 60, 2e-4, 200
    ),
    "gpu": PairPlan(
        1000,
        100,
        1319,
        1319,
        "full",
        1e-4,
        1.0,
        32,
        1024,
        256,
        512,
        "cuda",
        "bfloat16",
        True,
        10,
        3000,
        1600,
        5e-4,
        3000,
    ),
}
