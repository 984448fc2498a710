"""The shift, batching and log-probabilities at target positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collm.models.language_model import LanguageModel
from collm.training import scoring
from collm.training.examples import Example, batches_by_length, collate, shift
from collm.training.scoring import read_gold
from tests.training.conftest import Tiny


def test_position_t_speaks_of_the_token_after_t() -> None:
    shifted = shift(Example([5, 6, 7, 8], [True, False, True, True]))
    assert shifted["input_ids"].tolist() == [5, 6, 7]
    assert shifted["gold"].tolist() == [6, 7, 8]
    assert shifted["target_mask"].tolist() == [False, True, True]


def test_padding_is_on_the_right_unattended_and_no_target() -> None:
    batch = collate([shift(Example([5, 6], [False, True])), shift(Example([7, 8, 9], [True, True, True]))])
    assert batch["input_ids"].tolist() == [[5, 0], [7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["target_mask"].tolist() == [[True, False], [True, True]]


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 64))
def test_batches_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = batches_by_length(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


def at_targets(model: LanguageModel, hidden: torch.Tensor, gold: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities and correctness where all tokens are targets."""
    batch = {"gold": gold[None], "target_mask": torch.ones_like(gold[None], dtype=torch.bool)}
    return list(read_gold(model, hidden[None], batch).values())


def test_chunks_do_not_change_values(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny_model(3), name="model")
    hidden, gold = torch.randn(17, model.hidden_size), torch.randint(0, 97, (17,))
    whole = at_targets(model, hidden, gold)
    monkeypatch.setattr(scoring, "MAX_LOGITS", 97 * 4)
    for mine, theirs in zip(at_targets(model, hidden, gold), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_only_the_shared_vocabulary_counts(tiny_model: Tiny) -> None:
    module = tiny_model(3)
    hidden, gold = torch.randn(5, 32), torch.randint(0, 50, (5,))
    logprob, correct = at_targets(LanguageModel(module, name="model", vocab_size=50), hidden, gold)
    logits = module.lm_head(hidden)[:, :50]
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[torch.arange(5), gold])
    assert correct.tolist() == (logits.argmax(-1) == gold).tolist()
