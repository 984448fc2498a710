"""How much of everything, for two cores or one GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        train_rows, validation_rows: of GSM8K's training split; None for all that are left.
        test_rows: read with their solutions.
        written_rows: of those, solved freely.
        method: how base and head are trained: "lora" or "full".
        learning_rate: of the base.
        epochs: over the training rows.
        batch_size: rows of an update.
        max_length: tokens of a row.
        max_new_tokens: of a solution.
        max_batch: solutions written at once.
        device, dtype: of the model.
        bf16: compute in bfloat16 while training.
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
    max_new_tokens: int
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
    """Sizes of the run with two language models; `train_rows` are those from which they learn to collaborate.

    Attributes:
        layers: of the whole model, the first ones, that the base has.
        heal_rows: solutions from which the base learns to do without the other layers.
        heal_texts: paragraphs of Python's documentation likewise.
        heal_learning_rate: of that.
        expert_rows: solutions from which the assistant learns. No row is in two of the three sets.
        frozen: also train a head alone, on the tuned base.
    """

    layers: int
    heal_rows: int
    heal_texts: int
    heal_learning_rate: float
    expert_rows: int
    frozen: bool


PAIR_PLANS = {
    "cpu": PairPlan(
        240, 8, 120, 32, "full", 1e-4, 1.0, 8, 384, 160, 16, "cpu", "float32", False, 10, 640, 320, 5e-4, 200, True
    ),
    "cpu-deep": PairPlan(
        240, 8, 120, 0, "full", 1e-4, 1.0, 8, 384, 160, 16, "cpu", "float32", False, 24, 240, 60, 2e-4, 200, False
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
        True,
    ),
}
