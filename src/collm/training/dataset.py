"""The training set, which joins examples with scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from collm.core.segments import SegmentLaw
from collm.errors import ConfigError
from collm.training.examples import Example, fingerprint
from collm.training.scores import Scores
from collm.training.targets import scatter, shift


class TrainingSet(Dataset[dict[str, Tensor]]):
    """Examples with the scores of assistants 1..K. The assistants themselves are not needed for training.

    Args:
        examples: the scored examples.
        assistant_scores: scores of each assistant.
        base_scores: scores of the base before training, required for a warm start.
        from_hidden_states: return the hidden states stored with the base's scores instead of tokens; for a frozen base.

    Raises:
        ConfigError: there are no assistant scores, the scores are of other examples, or hidden states are missing.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        assistant_scores: Sequence[Scores],
        base_scores: Scores | None = None,
        *,
        from_hidden_states: bool = False,
    ) -> None:
        if not assistant_scores:
            raise ConfigError("a training set needs the scores of at least one assistant, got none")
        if from_hidden_states and (base_scores is None or base_scores.hidden is None):
            raise ConfigError("the base's scores have no hidden states; score it with hidden_states=True")
        self.examples = examples
        self.from_hidden_states = from_hidden_states
        self.assistant_scores = list(assistant_scores)
        self.base_scores = base_scores
        self.fingerprint = fingerprint(examples)
        for scores in [*self.assistant_scores, *([] if base_scores is None else [base_scores])]:
            if scores.fingerprint != self.fingerprint:
                raise ConfigError(
                    f"the scores belong to other examples ({scores.fingerprint[:12]}, expected "
                    f"{self.fingerprint[:12]}); score this data"
                )

    @property
    def law(self) -> SegmentLaw | None:
        """The base's tokens that begin a segment; None if models share a tokenizer."""
        segments = self.examples[0].segments
        return None if segments is None else segments.law

    @property
    def num_assistants(self) -> int:
        return len(self.assistant_scores)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example.token_ids) for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One example as `shift` gives it, with its scores.

        Returns:
            Its tensors, shape (T,), with assistant_logprobs and assistant_correct, shape (T, K), 0 and false outside
            of targets. From hidden states, T is the number of targets, and hidden, shape (T, H), base_logprob and
            base_correct, shape (T,), replace input_ids and gold.
        """
        scores = {
            "assistant_logprobs": torch.stack([each.logprob(index) for each in self.assistant_scores], dim=-1),
            "assistant_correct": torch.stack([each.correct(index) for each in self.assistant_scores], dim=-1),
        }  # at the targets, (n, K)
        if self.from_hidden_states:
            assert self.base_scores is not None
            assert self.base_scores.hidden is not None
            return {
                "hidden": self.base_scores.hidden.of(index),
                "base_logprob": self.base_scores.logprob(index),
                "base_correct": self.base_scores.correct(index),
                "target_mask": torch.ones(len(scores["assistant_logprobs"]), dtype=torch.bool),
                **scores,
            }
        shifted = shift(self.examples[index])
        return shifted | {name: scatter(values, shifted["target_mask"]) for name, values in scores.items()}
