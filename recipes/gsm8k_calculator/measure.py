"""Measurements of the recipe: equations with the given solution as context, and solutions that are generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from collm.core.head import DeferralHead
from collm.core.objective import defer_probs, marginal_logprobs
from collm.core.types import Completion
from collm.evaluation.intervals import Interval, bootstrap_interval, ratio_interval
from collm.evaluation.metrics import last_number
from collm.models.language_model import LanguageModel
from collm.training.data import Row
from collm.training.examples import Example
from collm.training.scores import Scores
from collm.training.targets import batches_by_length, collate, read_targets, shift
from recipes.gsm8k_calculator.data import MARK, evaluate

ANSWER = "####"


@dataclass(frozen=True)
class Read:
    """The authors' predictions for the target tokens of a set of solutions, M tokens in total.

    Attributes:
        logprobs: log-probabilities of the gold tokens, the base's first, nats, shape (M, K + 1).
        correct: whether the author's argmax is the gold token, bool, shape (M, K + 1).
        silent: whether the author abstains, bool, shape (M, K + 1).
        defer_logits: shape (M, K).
    """

    logprobs: Tensor
    correct: Tensor
    silent: Tensor
    defer_logits: Tensor

    def nll(self) -> float:
        """NLL of the joint model, in nats per token."""
        return -marginal_logprobs(self.logprobs[:, 0], self.logprobs[:, 1:], self.defer_logits).mean().item()

    def base_nll(self) -> float:
        """NLL of the base alone, in nats per token."""
        return -self.logprobs[:, 0].mean().item()

    def deferred(self, threshold: float) -> Tensor:
        """Where an assistant is asked, bool, shape (M,)."""
        return defer_probs(self.defer_logits) > threshold

    def asked(self, threshold: float) -> Tensor:
        """The author that the policy names, 0 for the base, shape (M,)."""
        return torch.where(self.deferred(threshold), self.defer_logits.argmax(-1) + 1, 0)

    def asked_in_vain(self, threshold: float) -> Tensor:
        """Where an assistant is asked but abstains, bool, shape (M,)."""
        return self.silent.gather(1, self.asked(threshold).unsqueeze(1))[:, 0]

    def right(self, threshold: float) -> Tensor:
        """Where the token written is the gold token, bool, shape (M,). The base writes in place of an assistant that
        abstains.
        """
        asked = self.asked(threshold)
        writer = torch.where(self.asked_in_vain(threshold), 0, asked)
        return self.correct.gather(1, writer.unsqueeze(1))[:, 0]

    def rule_nll(self) -> float:
        """NLL if the first assistant writes wherever it does not abstain, in nats per token."""
        return -torch.where(self.silent[:, 1], self.logprobs[:, 0], self.logprobs[:, 1]).mean().item()


@torch.inference_mode()
def read(
    base: LanguageModel,
    head: DeferralHead,
    examples: Sequence[Example],
    assistants: Sequence[Scores],
    *,
    max_batch_tokens: int = 16384,
) -> Read:
    """Let the base read solutions for which the assistants' scores exist.

    Args:
        base: the base.
        head: the deferral head.
        examples: the solutions.
        assistants: scores of each assistant.
        max_batch_tokens: largest number of tokens in a batch.
    """
    parts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for indices in batches_by_length([len(one.token_ids) for one in examples], max_batch_tokens):
        batch = collate([shift(examples[index]) for index in indices])
        ids, attended, gold, mask = (
            batch[name].to(base.input_device) for name in ("input_ids", "attention_mask", "gold", "target_mask")
        )
        hidden = base.hidden_states(ids, attention_mask=attended, use_cache=False)[mask]
        logprob, correct = read_targets(base, hidden, gold[mask])
        counts = mask.sum(-1).tolist()
        pieces = zip(*(torch.split(one.cpu(), counts) for one in (logprob, correct, head(hidden))), strict=True)
        parts |= zip(indices, pieces, strict=True)
    logprob, correct, defer_logits = (torch.cat([parts[i][n] for i in range(len(examples))]) for n in range(3))
    unknown = -torch.tensor(float(base.vocab_size)).log()
    silent = [torch.zeros_like(correct), *((scores.logprobs - unknown).abs() < 1e-6 for scores in assistants)]
    return Read(
        torch.stack([logprob, *(scores.logprobs for scores in assistants)], dim=-1),
        torch.stack([correct, *(scores.corrects for scores in assistants)], dim=-1),
        torch.stack(silent, dim=-1),
        defer_logits.float(),
    )


def results_in(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[range]]:
    """For each solution, the positions of its marks' results among its target tokens, including the closing >>."""
    opens, equals, closes = (tokenizer.convert_tokens_to_ids(token) for token in ("<<", "=", ">>"))
    found = []
    for example in examples:
        token_ids = [t for t, is_target in zip(example.token_ids[1:], example.is_target[1:], strict=True) if is_target]
        spans, start = list[range](), None
        inside = False
        for position, token_id in enumerate(token_ids):
            inside = token_id == opens or (inside and token_id != closes)
            if inside and token_id == equals:
                start = position + 1
            if token_id == closes and start is not None:
                spans.append(range(start, position + 1))
                start = None
        found.append(spans)
    return found


def equations(right: Tensor, spans: Sequence[Sequence[range]], counts: Sequence[int]) -> Interval:
    """Share of results whose tokens are all right. The interval treats each solution as one unit.

    Args:
        right: whether each target token is right, bool, shape (M,).
        spans: positions of the results of each solution.
        counts: number of target tokens of each solution.
    """
    each = [
        [bool(part[span.start : span.stop].all()) for span in of_one]
        for part, of_one in zip(torch.split(right, list(counts)), spans, strict=True)
    ]
    return ratio_interval([sum(one) for one in each], [len(one) for one in each])


@dataclass(frozen=True)
class Written:
    """Measurements of generated solutions.

    Attributes:
        equations: share of their marks that are right; None if there are no marks.
        num_equations: number of marks.
        answers: share of final answers that are right.
        deferral_rate: share of tokens written by assistants.
        calls: share of tokens for which a tool was asked.
        in_vain: share of tokens for which a tool was asked but abstained.
    """

    equations: Interval | None
    num_equations: int
    answers: Interval
    deferral_rate: float
    calls: float
    in_vain: float


def written(completions: Sequence[Completion], rows: Sequence[Row], calls: int, abstained: int) -> Written:
    """Measure completions of these rows' problems.

    Args:
        completions: the generated solutions.
        rows: their problems.
        calls: number of tool calls.
        abstained: number of tool calls without an answer.
    """
    marks = [[is_right(*mark) for mark in MARK.findall(completion.text)] for completion in completions]
    answers = [final_answer(c.text, row.completion) for c, row in zip(completions, rows, strict=True)]
    authors = [author for completion in completions for author in completion.authors]
    num_marks = sum(map(len, marks))
    return Written(
        ratio_interval([sum(one) for one in marks], [len(one) for one in marks]) if num_marks else None,
        num_marks,
        bootstrap_interval(answers),
        sum(author > 0 for author in authors) / len(authors),
        calls / len(authors),
        abstained / len(authors),
    )


def is_right(expression: str, result: str) -> bool:
    """Whether a mark's result equals its expression's value, or is rounded or cut at two or more decimals."""
    value, stated = (evaluate(text.replace(",", "").strip()) for text in (expression, result))
    if value is None or stated is None:
        return False
    places = len(result.strip().partition(".")[2])
    return value == stated or (places >= 2 and abs(value - stated) < Fraction(1, 10**places))


def final_answer(prediction: str, reference: str) -> float:
    """1 if the number after the first #### is the reference's, else 0."""
    _, found, answer = prediction.partition(ANSWER)
    return last_number(answer, reference) if found else 0.0


def mark_score(prediction: str, reference: str) -> float:
    """Share of a solution's marks that are right; 0 without marks. Calibration uses this metric."""
    marks = MARK.findall(prediction)
    return sum(is_right(*mark) for mark in marks) / len(marks) if marks else 0.0
