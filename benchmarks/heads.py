"""Heads of each shape and objective on stored scores of a base and its assistants: NLL at equal deferral rates.

    python -m benchmarks.heads OUT --pair facts
    python -m benchmarks.heads OUT --pair smollm2 --data DIR

The first run writes the scores into OUT. `facts` and `facts-2` are recipes/facts with one and two assistants. `smollm2`
is SmolLM2-135M without six of its 30 layers as base, untuned, and all of it as assistant, on 240 solutions of GSM8K.
A quarter of the examples is held out for the comparison. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import run_parts
from collm.core.head import DeferralHead
from collm.core.types import author_name
from collm.demo.real import smollm2
from collm.evaluation.intervals import statistic_interval
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec, load_model, load_tokenizer
from collm.text.template import PromptTemplate
from collm.training.data import load_rows, write_rows
from collm.training.examples import encode
from collm.training.fitting import fit_likelihood
from collm.training.gain import fit_gain
from collm.training.scores import load_scores, stored_examples
from collm.training.scoring import write_scores
from recipes.facts.tiny_models import make_models
from recipes.facts.world import DemoWorld
from recipes.smollm2.gsm8k import load_problems
from recipes.smollm2.measure import chat

RATES = (0.1, 0.3, 0.5)
REMOVED = range(14, 20)  # layers of SmolLM2 that the base does not have
SHAPES: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear, doubt": {"doubt": True},
    "mlp": {"width": 256},
    "mlp, doubt": {"width": 256, "doubt": True},
}
REFERENCE = "linear, marginal + cost"


def make(pair: str, data: str | None, out: Path) -> None:
    """Write the scores of a pair into out/scores, the base's with hidden states."""
    rows = out / "rows.jsonl"
    if pair == "smollm2":
        assert data is not None, "this pair needs --data"
        problems = load_problems(data).train
        chosen = random.Random(0).sample(problems, len(problems))[112:352]
        answers = [[*chat(row), {"role": "assistant", "content": row.completion}] for row in chosen]
        out.mkdir(parents=True, exist_ok=True)
        rows.write_text("".join(json.dumps({"messages": one}) + "\n" for one in answers), encoding="utf-8")
        smollm2(out / "model")
        paths = [out / "model"] * 2
    else:
        world = DemoWorld(num_assistants=2 if pair == "facts-2" else 1, seed=0, separator="")
        models = make_models(world, out / "models", seed=0, on_step=lambda *_: None)
        paths = [models.base, *models.experts]
        write_rows(rows, world.train)
    specs = [ModelSpec(str(path), dtype="float32", device="cpu") for path in paths]
    tokenizer = load_tokenizer(specs[0])
    examples = encode(load_rows(rows), PromptTemplate.of(tokenizer), tokenizer, max_length=384)
    for author, spec in enumerate(specs):
        module: Any = load_model(spec)
        if pair == "smollm2" and author == 0:
            module.model.layers = nn.ModuleList(x for at, x in enumerate(module.model.layers) if at not in REMOVED)
        model = LanguageModel(module, name=author_name(author), vocab_size=len(tokenizer))
        where = out / "scores" / author_name(author)
        write_scores(model, examples, where, spec=spec, hidden_states=author == 0)


class Pair:
    """Stored scores of a base and K assistants, some examples of which are held out."""

    def __init__(self, directory: Path, seed: int) -> None:
        names = sorted(one.name for one in directory.iterdir())
        base, *assistants = (load_scores(directory / author_name(author)) for author in range(len(names)))
        count = len(base.offsets) - 1
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        stored = stored_examples(base, assistants)
        examples = [stored[index] for index in order]
        self.train, test = examples[: -(count // 4)], examples[-(count // 4) :]
        self.sizes = [len(one["hidden"]) for one in test]
        self.columns = {name: torch.cat([one[name] for one in test]) for name in test[0]}
        self.num_assistants = len(assistants)

    def fitted(self, shape: dict[str, Any], objective: str, clip: float, cost: float) -> tuple[Tensor, float]:
        """The defer logits of a head on the held-out tokens, and the seconds that it took to fit."""
        count, hidden, started = self.num_assistants, self.columns["hidden"], time.perf_counter()
        head = DeferralHead(hidden.shape[-1], count, predicts_gain=objective == "gain", **shape)
        if objective == "gain":
            fit_gain(head, self.train, clip=clip, seed=0)
        else:
            fit_likelihood(head, self.train, [cost] * count, seed=0)
        seconds = time.perf_counter() - started
        with torch.no_grad():
            return head(hidden, self.columns["doubt"]), seconds


def compared(pair: Pair, clip: float, cost: float) -> dict[str, Any]:
    """The NLL of each rule at each rate, and less that of the reference, with intervals over examples."""
    base, assistants, doubt = (pair.columns[name] for name in ("base_logprob", "assistant_logprobs", "doubt"))
    rules: dict[str, tuple[Tensor, Tensor, float]] = {}  # what a rule ranks by, its assistant, seconds
    for objective in ("marginal + cost", "gain"):
        for name, shape in SHAPES.items():
            u, seconds = pair.fitted(shape, objective, clip, cost)
            rules[f"{name}, {objective}"] = u.logsumexp(-1), u.argmax(-1), seconds
    first = torch.zeros(len(base), dtype=torch.long)
    chance = torch.rand(len(base), generator=torch.Generator().manual_seed(0))
    rules |= {
        "log max-probability": (-doubt[:, 0], first, 0.0),
        "entropy": (doubt[:, 1], first, 0.0),
        "oracle": (assistants.amax(-1) - base, assistants.argmax(-1), 0.0),
        "random": (chance, first, 0.0),
    }
    found: dict[str, Any] = {name: {"seconds": round(seconds, 1)} for name, (_, _, seconds) in rules.items()}
    for rate in RATES:
        nll = {}
        for name, (scores, author, _) in rules.items():
            chosen = torch.zeros(len(base), dtype=torch.bool)
            chosen[scores.argsort(descending=True, stable=True)[: round(rate * len(base))]] = True
            nll[name] = -torch.where(chosen, assistants.gather(-1, author[:, None]).squeeze(-1), base)
        for name, values in nll.items():
            found[name][str(rate)] = _mean(values, pair.sizes)
            found[name][f"{rate} minus {REFERENCE}"] = _mean(values - nll[REFERENCE], pair.sizes)
            if name.endswith(", gain"):
                found[name][f"{rate} minus linear, gain"] = _mean(values - nll["linear, gain"], pair.sizes)
    return {
        "tokens": sum(len(one["hidden"]) for one in pair.train),
        "test_tokens": len(base),
        "base": -base.mean().item(),
        "assistants": (-assistants.mean(0)).tolist(),
        "rules": found,
    }


def _mean(values: Tensor, sizes: Sequence[int]) -> dict[str, float]:
    """Mean per token. The interval resamples examples."""
    sums = [(part.sum().item(), float(len(part))) for part in torch.split(values.double(), list(sizes))]
    mean: Callable[[Tensor], Tensor] = lambda totals: totals[..., 0] / totals[..., 1]  # noqa: E731
    return asdict(statistic_interval(mean, sums))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="for the models and their scores")
    parser.add_argument("--pair", choices=("facts", "facts-2", "smollm2"), default="facts")
    parser.add_argument("--data", help="directory of GSM8K, for smollm2")
    parser.add_argument("--clip", type=float, default=8.0, help="of the objective gain, nats")
    parser.add_argument("--cost", type=float, default=1.0, help="deferral cost of the marginal likelihood, nats")
    parser.add_argument("--seed", type=int, default=0, help="of the examples held out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not (scores := options.directory / "scores").exists():
        make(options.pair, options.data, options.directory)
    pair = Pair(scores, options.seed)
    run_parts("benchmarks.heads", options, {"results": lambda: compared(pair, options.clip, options.cost)})


if __name__ == "__main__":
    main()
