"""What training reads: examples with the assistants' scores, and how they become a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from collm.errors import ConfigError
from collm.training.examples import Example, fingerprint
from collm.training.scores import Scores
from collm.training.targets import Shifted, pad, shift


class TrainingSet(Dataset[dict[str, Tensor]]):
    """Examples with the scores of the assistants 1..K, which are not needed themselves any more.

    Args:
        examples: what was scored.
        assistant_scores: one for each assistant.
        base_scores: of the base before training; a warm start needs them.

    Raises:
        ConfigError: no assistant's scores, or scores of other examples.
    """

    def __init__(
        self, examples: Sequence[Example], assistant_scores: Sequence[Scores], base_scores: Scores | None = None
    ) -> None:
        if not assistant_scores:
            raise ConfigError("a training set needs the scores of at least one assistant, none came")
        self.examples = examples
        self.assistant_scores = list(assistant_scores)
        self.base_scores = base_scores
        self.fingerprint = fingerprint(examples)
        for scores in [*self.assistant_scores, *([] if base_scores is None else [base_scores])]:
            if scores.fingerprint != self.fingerprint:
                raise ConfigError(
                    f"the scores are of other examples ({scores.fingerprint[:12]}) than came here "
                    f"({self.fingerprint[:12]}); score this data"
                )

    @property
    def num_assistants(self) -> int:
        return len(self.assistant_scores)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One shifted example.

        Returns:
            input_ids, gold, target_mask, shape (T,); assistant_logprobs and assistant_correct, shape (T, K), 0 and
            false off the targets.
        """
        shifted = shift(self.examples[index])
        logprobs = torch.zeros(len(shifted.gold), self.num_assistants)
        correct = torch.zeros(len(shifted.gold), self.num_assistants, dtype=torch.bool)
        logprobs[shifted.mask] = torch.stack([scores.logprob(index) for scores in self.assistant_scores], dim=-1)
        correct[shifted.mask] = torch.stack([scores.correct(index) for scores in self.assistant_scores], dim=-1)
        return {
            "input_ids": shifted.input_ids,
            "gold": shifted.gold,
            "target_mask": shifted.mask,
            "assistant_logprobs": logprobs,
            "assistant_correct": correct,
        }


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch padded on the right, with the arguments of `JointModule.forward`."""
    batch = pad([Shifted(item["input_ids"], item["gold"], item["target_mask"]) for item in items])
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "gold": batch.gold,
        "target_mask": batch.mask,
        "assistant_logprobs": pad_sequence([item["assistant_logprobs"] for item in items], batch_first=True),
        "assistant_correct": pad_sequence([item["assistant_correct"] for item in items], batch_first=True),
    }
