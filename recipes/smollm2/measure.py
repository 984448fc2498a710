"""Measurements of a system on GSM8K's test problems: generated solutions, and given solutions as context."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from collm import CoLLM, SamplingParams
from collm.core.policies import Policy
from collm.core.types import Completion
from collm.evaluation.gold import gold_views, greedy_writes
from collm.evaluation.intervals import bootstrap_interval, paired_difference, ratio_interval
from collm.evaluation.metrics import last_number
from collm.text.text_tokenizer import TextTokenizer
from collm.training.data import Row
from collm.training.examples import Example, Examples
from recipes.smollm2.gsm8k import MARK, equations, is_right

ORACLE = "oracle"


@dataclass(frozen=True)
class System:
    """A row of the table.

    Attributes:
        name: name of the row.
        model: the model that decodes.
        policy: the policy with which it decodes.
        shots: number of solved examples before the question.
        threshold: threshold for reading given solutions; None if it does not read any.
    """

    name: str
    model: CoLLM
    policy: Policy
    shots: int = 0
    threshold: float | None = None


def chat(row: Row, shots: Sequence[Row] = ()) -> list[dict[str, str]]:
    """A problem as a chat, after solved problems."""
    turns = [
        {"role": role, "content": str(content)}
        for shot in shots
        for role, content in (("user", shot.prompt), ("assistant", shot.completion))
    ]
    return [*turns, {"role": "user", "content": str(row.prompt)}]


def solve(
    system: System, rows: Sequence[Row], shots: Sequence[Row], params: SamplingParams, batch: int
) -> dict[str, Any]:
    """Generate solutions of these problems and measure them."""
    prompts = [chat(row, shots[: system.shots]) for row in rows]
    started = time.monotonic()
    done = system.model.generate(prompts, params, policy=system.policy, max_batch=batch, lookahead=0)
    seconds = time.monotonic() - started
    authors = [author for one in done for author in one.authors]
    calls, in_vain = (sum(getattr(used, name) for used in done.usage.values()) for name in ("calls", "abstained"))
    return {
        "answers": [last_number(one.text, row.completion) for one, row in zip(done, rows, strict=True)],
        "marks": [[is_right(*mark) for mark in MARK.findall(one.text)] for one in done],
        "deferral_rate": sum(author > 0 for author in authors) / len(authors),
        "calls": calls / len(authors),
        "in_vain": in_vain / len(authors),
        "tokens": len(authors),
        "seconds": round(seconds, 1),
        "texts": [_tokens_and_authors(one) for one in done[:5]],
    }


def _tokens_and_authors(completion: Completion) -> dict[str, Any]:
    return {"tokens": completion.token_texts, "authors": completion.authors}


def summary(solved: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    """Shares with their intervals, and the paired difference between this system's answers and another's."""
    marks = solved["marks"]
    count = sum(map(len, marks))
    right = ratio_interval([sum(one) for one in marks], [len(one) for one in marks]) if count else None
    others = {name: solved[name] for name in ("deferral_rate", "calls", "in_vain", "tokens", "seconds", "texts")}
    return {
        "answers": asdict(bootstrap_interval(solved["answers"])),
        "difference": asdict(paired_difference(solved["answers"], against["answers"])),
        "equations": None if right is None else asdict(right),
        "num_equations": count,
        **others,
    }


def read_solutions(model: CoLLM, examples: Examples, thresholds: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Measure greedy decoding at each threshold with the given solutions as context, and the NLL of the base.

    The oracle writes a token right if the base or the calculator does.
    """
    views = gold_views(model, examples)
    spans = results_in(examples, TextTokenizer(model.tokenizer))
    counts = [example.num_targets for example in examples]
    written = {name: greedy_writes(views, threshold) for name, threshold in thresholds.items()}
    written[ORACLE] = views.base_correct | views.assistant_correct.any(-1)
    measures = views.measures()
    return {
        name: {
            "equations": asdict(equations(right, spans, counts)),
            "tokens": right.double().mean().item(),
            "base_nll": measures["base_nll"],
            "joint_nll": measures["loss"],
        }
        for name, right in written.items()
    }


def results_in(examples: Sequence[Example], tokenizer: TextTokenizer) -> list[list[range]]:
    """For each solution, the positions of its marks' results among its target tokens, up to the closing >>."""
    found = []
    for example in examples:
        pairs = zip(example.token_ids[1:], example.is_target[1:], strict=True)
        token_ids = [token_id for token_id, is_target in pairs if is_target]
        pieces = [tokenizer.token_bytes[token_id] or b"" for token_id in token_ids]
        ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
        text = b"".join(pieces).decode(errors="surrogateescape")
        found.append([_positions(ends, *match.span(2)) for match in MARK.finditer(text)])
    return found


def _positions(ends: Tensor, start: int, end: int) -> range:
    """The tokens that contain characters from start to end, or one of the two characters that close the mark."""
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    at = ((ends > start) & (starts < end + 2)).nonzero().squeeze(-1)
    return range(int(at[0]), int(at[-1]) + 1)
