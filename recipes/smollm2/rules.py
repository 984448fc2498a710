"""Rules that choose between base and assistant at each token of given solutions, compared at equal deferral rates."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from collm import CoLLM
from collm.core.combinations import CombiningPolicy, MixturePolicy, ProductPolicy, ProxyTuningPolicy
from collm.core.head import author_logprobs, defer_probs
from collm.evaluation.intervals import Interval, statistic_interval
from collm.models.language_model import LanguageModel
from collm.training.examples import Example, batch_tokens_on, batches_by_length, collate, shift
from collm.training.inspection import auc

LEARNED, DOUBT, SURER = "learned head", "the base's doubt", "who is surer"
RANDOM, ORACLE = "at random", "oracle"
_COMBINED: dict[str, CombiningPolicy] = {
    "mixture": MixturePolicy(),
    "product": ProductPolicy(),
    "proxy": ProxyTuningPolicy(),
}
_KINDS = {
    "digits": re.compile(r"\s*\d+"),
    "signs of sums and marks": re.compile(r"\s*[-+*/=<>#$%().]+\s*"),
    "ends of lines and texts": re.compile(r"\s*\n\s*|<\|im_end\|>"),
    "words": re.compile(r"[\s\S]*"),
}


@dataclass(frozen=True)
class Read:
    """Two models' predictions for M gold tokens.

    Attributes:
        sizes: number of tokens of each solution.
        token_ids: the gold tokens, shape (M,).
        logprobs: log-probabilities of the gold tokens by base and assistant, nats, shape (2, M).
        right: whether their argmax is the gold token, bool, shape (2, M).
        surest: the largest probability that each gives to a token, shape (2, M).
        defer_prob: the head's defer prob, shape (M,).
        combined: log-probabilities of the gold tokens by each rule that combines both models, nats, shape (3, M).
    """

    sizes: list[int]
    token_ids: Tensor
    logprobs: Tensor
    right: Tensor
    surest: Tensor
    defer_prob: Tensor
    combined: Tensor


@torch.inference_mode()
def read_pair(model: CoLLM, examples: Sequence[Example], untuned: nn.Module) -> Read:
    """Let the models of a collaboration read solutions.

    Args:
        model: the collaboration.
        examples: the solutions.
        untuned: the base before it was trained, for proxy tuning.
    """
    base, assistant = (cast(LanguageModel, one) for one in model.members)
    models = [base, assistant, LanguageModel(untuned, name="untuned", vocab_size=base.vocab_size)]
    found: dict[int, list[Tensor]] = {}
    for indices in batches_by_length([len(one.token_ids) for one in examples], batch_tokens_on(base.device)):
        batch = collate([shift(examples[index]) for index in indices])
        ids, attended, gold, mask = (
            batch[name].to(base.device) for name in ("input_ids", "attention_mask", "gold", "target_mask")
        )
        gold = gold[mask]
        hidden = [one.hidden_states(ids, attention_mask=attended, use_cache=False)[mask] for one in models]
        logprobs = {
            author: one.logits(states).float().log_softmax(-1)
            for author, (one, states) in enumerate(zip(models, hidden, strict=True))
        }
        defer_logits = model.head.read(hidden[0].to(model.head.weight.device), logprobs[0]).to(gold.device)
        values = _values(gold, logprobs, defer_logits)
        parts = (torch.split(one.cpu(), mask.sum(-1).tolist(), dim=-1) for one in values)
        found |= dict(zip(indices, map(list, zip(*parts, strict=True)), strict=True))
    columns = [torch.cat([found[i][n] for i in range(len(examples))], dim=-1) for n in range(len(fields(Read)) - 1)]
    return Read([example.num_targets for example in examples], *columns)


def _values(gold: Tensor, logprobs: dict[int, Tensor], defer_logits: Tensor) -> list[Tensor]:
    authors = [logprobs[0], logprobs[1]]
    at_gold = [one.gather(-1, gold[:, None]).squeeze(-1) for one in authors]
    odds = author_logprobs(defer_logits)
    combined = []
    for policy in _COMBINED.values():
        read = {0, *policy.consults(1)}
        logits = policy.combine({author: logprobs[author] for author in read}, odds)
        combined.append(logits.log_softmax(-1).gather(-1, gold[:, None]).squeeze(-1))
    return [
        gold,
        torch.stack(at_gold),
        torch.stack([one.argmax(-1) == gold for one in authors]),
        torch.stack([one.amax(-1).exp() for one in authors]),
        defer_probs(defer_logits),
        torch.stack(combined),
    ]


def compared(read: Read, rates: Sequence[float], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """NLL and share of right tokens of each rule at each rate, with intervals over solutions."""
    scores = {
        LEARNED: read.defer_prob,
        DOUBT: 1 - read.surest[0],
        SURER: read.surest[1] - read.surest[0],
        ORACLE: read.logprobs[1] - read.logprobs[0],
    }
    gain = read.logprobs[1] - read.logprobs[0]
    base, assistant = -read.logprobs
    rules: dict[str, list[dict[str, Any]]] = {name: [] for name in (*scores, RANDOM)}
    for rate in rates:
        chosen = {name: _highest(one, rate) for name, one in scores.items()}
        nll = {name: torch.where(mask, assistant, base) for name, mask in chosen.items()}
        nll[RANDOM] = rate * assistant + (1 - rate) * base
        right = {name: torch.where(mask, read.right[1], read.right[0]).double() for name, mask in chosen.items()}
        right[RANDOM] = rate * read.right[1].double() + (1 - rate) * read.right[0].double()
        for name, by_rate in rules.items():
            by_rate.append(
                {
                    "rate": rate,
                    "nll": asdict(_mean(nll[name], read.sizes)),
                    "right": right[name].mean().item(),
                    "learned_minus": asdict(_mean(nll[LEARNED] - nll[name], read.sizes)),
                    "learned_minus_right": asdict(_mean(right[LEARNED] - right[name], read.sizes)),
                }
            )
    return {
        "tokens": len(read.token_ids),
        "alone": {
            name: {"nll": asdict(_mean(nll, read.sizes)), "right": read.right[author].double().mean().item()}
            for author, (name, nll) in enumerate({"base": base, "assistant": assistant}.items())
        },
        "combined": {name: asdict(_mean(-one, read.sizes)) for name, one in zip(_COMBINED, read.combined, strict=True)},
        "rules": rules,
        "auc": {name: auc(one, gain > 0) for name, one in scores.items() if name != ORACLE},
        "thresholds": {str(rate): _threshold(read.defer_prob, rate) for rate in rates},
        "kinds": _kinds(read, scores, gain, tokenizer),
    }


def threshold_at(found: dict[str, Any], rate: float) -> float:
    """The threshold with which the learned head defers at this rate on the given solutions."""
    return float(found["thresholds"][str(rate)])


def _highest(scores: Tensor, rate: float) -> Tensor:
    """Mark the tokens with the highest scores, a share `rate` of all, bool, shape (M,)."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[: round(rate * len(scores))]] = True
    return chosen


def _threshold(scores: Tensor, rate: float) -> float:
    return scores.double().quantile(1 - rate).item()


def _mean(values: Tensor, sizes: Sequence[int]) -> Interval:
    """Mean per token. The interval resamples solutions."""
    sums = [(part.sum().item(), float(len(part))) for part in values.double().split(list(sizes))]
    mean: Callable[[Tensor], Tensor] = lambda totals: totals[..., 0] / totals[..., 1]  # noqa: E731
    return statistic_interval(mean, sums)


def _kinds(
    read: Read, scores: dict[str, Tensor], gain: Tensor, tokenizer: PreTrainedTokenizerBase, rate: float = 0.3
) -> dict[str, Any]:
    """For each kind of token: its share, the assistant's gain, and how often each rule defers it at one rate."""
    texts = [tokenizer.decode([token_id]) for token_id in read.token_ids.tolist()]
    kinds = [next(name for name, shape in _KINDS.items() if shape.fullmatch(text)) for text in texts]
    found = {}
    for kind in _KINDS:
        mask = torch.tensor([one == kind for one in kinds])
        if mask.any():
            found[kind] = {
                "share": mask.double().mean().item(),
                "gain": gain[mask].mean().item(),
                "deferred": {name: _highest(one, rate)[mask].double().mean().item() for name, one in scores.items()},
            }
    return found
