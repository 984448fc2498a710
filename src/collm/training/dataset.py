"""The training set, which joins examples with scores, and its collators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from collm.core.segments import SegmentLaw
from collm.errors import ConfigError
from collm.training.examples import Example, fingerprint
from collm.training.scores import Scores
from collm.training.targets import Shifted, pad, shift


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
        """One shifted example.

        Returns:
            input_ids, gold, target_mask, shape (T,); assistant_logprobs and assistant_correct, shape (T, K), 0 and
            false outside of targets. For models with different tokenizers also scored and rows, as in `Shifted`, and
            target_mask is true where a segment begins. From hidden states, T is the number of targets, and hidden,
            shape (T, H), base_logprob and base_correct, shape (T,), replace input_ids and gold.
        """
        if self.from_hidden_states:
            return self._targets(index)
        shifted = shift(self.examples[index])
        logprobs = torch.zeros(len(shifted.gold), self.num_assistants)
        correct = torch.zeros(len(shifted.gold), self.num_assistants, dtype=torch.bool)
        logprobs[shifted.mask], correct[shifted.mask] = self._assistants(index)
        return {
            "input_ids": shifted.input_ids,
            "gold": shifted.gold,
            "target_mask": shifted.mask,
            "assistant_logprobs": logprobs,
            "assistant_correct": correct,
            **({} if shifted.rows is None else {"scored": shifted.scored, "rows": shifted.rows}),
        }

    def _targets(self, index: int) -> dict[str, Tensor]:
        assert self.base_scores is not None
        assert self.base_scores.hidden is not None
        logprobs, correct = self._assistants(index)
        return {
            "hidden": self.base_scores.hidden.of(index),
            "base_logprob": self.base_scores.logprob(index),
            "base_correct": self.base_scores.correct(index),
            "target_mask": torch.ones(len(logprobs), dtype=torch.bool),
            "assistant_logprobs": logprobs,
            "assistant_correct": correct,
        }

    def _assistants(self, index: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and flags at one example's targets, shape (n, K)."""
        logprobs = torch.stack([scores.logprob(index) for scores in self.assistant_scores], dim=-1)
        return logprobs, torch.stack([scores.correct(index) for scores in self.assistant_scores], dim=-1)


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate examples, padded on the right, to the arguments of `JointModule.forward`."""
    if "hidden" in items[0]:
        return {name: pad_sequence([item[name] for item in items], batch_first=True) for name in items[0]}
    shifted = [
        Shifted(
            one["input_ids"], one["gold"], one["target_mask"], one.get("scored", one["target_mask"]), one.get("rows")
        )
        for one in items
    ]
    batch = pad(shifted)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "gold": batch.gold,
        "target_mask": batch.mask,
        "assistant_logprobs": pad_sequence([item["assistant_logprobs"] for item in items], batch_first=True),
        "assistant_correct": pad_sequence([item["assistant_correct"] for item in items], batch_first=True),
        **({} if batch.rows is None else {"scored": batch.scored, "rows": batch.rows}),
    }


def collate_padding_free(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate examples to one row with position ids that restart at each example, without an attention mask."""
    batch = {name: torch.cat([item[name] for item in items]).unsqueeze(0) for name in items[0]}
    if "input_ids" in batch:
        positions = [torch.arange(len(item["input_ids"])) for item in items]
        batch["position_ids"] = torch.cat(positions).unsqueeze(0)
    return batch
