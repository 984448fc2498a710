"""Models with different tokenizers: length of segments, what experts are asked for, and cost of decoding.

python -m benchmarks.segments --tokenizers DIR --data GSM8K/train.jsonl --out benchmarks/results/segments.json
python -m benchmarks.segments --parts ends --out benchmarks/results/cpu-segments-ends.json
python -m benchmarks.segments --parts speed --out benchmarks/results/cpu-segments.json
"""

# ruff: noqa: RUF001 - Chinese commas

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import collm
from benchmarks.record import run_parts
from benchmarks.tokenizers import PACKAGES, fetch, load
from collm import CoLLM, CoLLMConfig, SamplingParams
from collm.core.head import defer_probs
from collm.core.policies import SingleAuthorPolicy
from collm.evaluation.gold import gold_examples, gold_views
from collm.evaluation.intervals import bootstrap_interval
from collm.evaluation.metrics import exact_match
from collm.run import RunConfig, train_collaboration
from collm.text.alignment import Alignment
from collm.text.text_tokenizer import GrowingIds, TextTokenizer
from collm.training.data import load_rows
from recipes.facts.two_tokenizers import FactEnds, make_models
from recipes.facts.world import DemoWorld

REPEATS = 5
EXPERTS: dict[str, tuple[FactEnds, float]] = {
    "knows where facts end": ("learned", 0.0),
    "does not know": ("unknown", 0.0),
    "always writes on": ("never", 0.0),
    "always writes on; deferral cost 1": ("never", 1.0),
}
"""What the expert learned after facts, and the deferral cost of the head's training."""
CHINESE = (
    "我们今天去公园散步，天气很好。然后去吃饭，晚上回家看书。",
    "这个问题的答案是四十二。请把结果写在纸上，明天交给老师。",
    "人工智能正在改变世界，但我们仍然需要耐心和好奇心。",
)
PIECES = (
    *("Janet", " eggs", " sells", " the", " remainder", ".", ",", "!", "?", " (", ")", ":", ";", '"', "'s", "n't"),
    *("\n", "\n\n", "\n\n\n", " ", "  ", "   ", "\t", "\r\n", "\u00a0", "\u00a0\u00a0", "\u3000", "\u2028"),
    *(
        "e\u0301",
        "\u00ef",
        "\U0001f44d\U0001f3fd",
        "\U0001f3f3\ufe0f\u200d\U0001f308",
        "日本語",
        "今日",
        "한국어",
        "привет",
    ),
    *(
        "0",
        "7",
        "48",
        "1234",
        "3,456.78",
        "$5",
        "%",
        "<<48/2=24>>",
        "####",
        "def f(x):",
        "    return",
        "_name",
        "://",
        "\\n",
    ),
)


@dataclass(frozen=True)
class Counted:
    """Counts for a pair of tokenizers over some texts.

    Attributes:
        boundaries: number of segment boundaries that the alignment predicts.
        absent: number of these boundaries where some author has no token end.
        changed: number of times that tokens already read changed because the text grew.
        base_tokens: number of the base's tokens.
        common: number of places where both tokenizers end a token, known only in hindsight.
        unread: number of texts that a tokenizer does not reproduce.
    """

    boundaries: int
    absent: int
    changed: int
    base_tokens: int
    common: int
    unread: int

    @property
    def tokens_per_segment(self) -> float:
        return self.base_tokens / max(self.boundaries, 1)


def count(alignment: Alignment, texts: Sequence[str], *, growing: bool) -> Counted:
    """Count over texts.

    Args:
        growing: also read each text segment by segment.
    """
    boundaries = absent = changed = base_tokens = common = unread = 0
    for text in texts:
        answer = text.encode()
        encoded = [one.encode_after([], text) for one in alignment.tokenizers]
        if any(one is None for one in encoded):
            unread += 1
            continue
        ends = [set(one.ends) for one in encoded if one is not None]
        boundary_positions = alignment.boundaries(answer)[1:]
        boundaries += len(boundary_positions)
        absent += sum(any(at not in each for each in ends) for at in boundary_positions)
        base_tokens += len(encoded[0].ids) if encoded[0] is not None else 0
        common += len(set.intersection(*ends))
        if growing:
            changed += sum(_changes(one, answer, boundary_positions) for one in alignment.tokenizers)
    return Counted(boundaries, absent, changed, base_tokens, common, unread)


def _changes(tokenizer: TextTokenizer, answer: bytes, boundary_positions: Sequence[int]) -> int:
    grown, done, changes = GrowingIds(tokenizer, []), list[int](), 0
    for at in boundary_positions:
        before = list(grown.ids)
        changes += not grown.grow(answer[:at], done) or grown.ids[: len(before)] != before
        done.append(at)
    return changes


def fuzzed(seed: int, boundaries: int, alignment: Alignment) -> Iterator[str]:
    """Random texts of unusual pieces, with at least this many boundaries in total."""
    rng, found = random.Random(seed), 0
    while found < boundaries:
        text = "".join(rng.choices(PIECES, k=rng.randrange(2, 60)))
        found += len(alignment.boundaries(text.encode())) - 1
        yield text


def code() -> list[str]:
    """The source of the package's own modules."""
    return [path.read_text(encoding="utf-8") for path in sorted(Path(collm.__file__).parent.glob("core/*.py"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=["pairs", "ends", "speed"], default=["pairs"])
    parser.add_argument("--tokenizers", type=Path, help="for pairs: directory of tokenizers; missing ones are fetched")
    parser.add_argument("--data", type=Path, help="for pairs: GSM8K's train.jsonl")
    parser.add_argument("--fuzzed", type=int, default=500_000, help="boundaries in random texts, over all pairs")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = {"pairs": lambda: pairs_of_tokenizers(options), "ends": ends, "speed": speed}
    run_parts("benchmarks.segments", options, parts)


def _row(base: str, assistant: str, counted: Mapping[str, Counted]) -> dict[str, Any]:
    gsm8k = counted["GSM8K"]
    return {
        "pair": f"{base} > {assistant}",
        "gsm8k": gsm8k.tokens_per_segment,
        "hindsight": gsm8k.base_tokens / max(gsm8k.common, 1),
        "code": counted["code"].tokens_per_segment,
        "chinese": counted["Chinese"].tokens_per_segment,
        **{name: sum(getattr(one, name) for one in counted.values()) for name in ("boundaries", "absent", "changed")},
    }


def ends() -> list[dict[str, Any]]:
    """Answers and deferrals of the demo's pair, with experts that differ in what they learned after facts."""
    return [
        {"expert": name, **row}
        for name, (fact_ends, cost) in EXPERTS.items()
        for row in _answers(_demo_pair(cost, fact_ends=fact_ends))
    ]


def speed() -> list[dict[str, Any]]:
    """Compare the demo's pair with one tokenizer and with two: microseconds per byte of answers, by batch size."""
    pairs = {name: _demo_pair(shared=shared) for name, shared in (("one tokenizer", True), ("two tokenizers", False))}
    found: dict[str, dict[str, list[float]]] = {name: {"1": [], "16": []} for name in pairs}
    for _ in range(REPEATS):
        for name, (model, world) in pairs.items():
            for batch in (1, 16):
                prompts = [row["prompt"] for row in world.test][: 24 if batch == 1 else None]
                started = time.perf_counter()
                done = model.generate(prompts, SamplingParams(max_tokens=64), max_batch=batch)
                seconds = time.perf_counter() - started
                found[name][str(batch)].append(1e6 * seconds / sum(len(one.text.encode()) for one in done))
    rows = [
        {"tokenizers": name, **{f"batch_{batch}": min(times) for batch, times in by_batch.items()}}
        for name, by_batch in found.items()
    ]
    one, two = rows
    return [*rows, {"tokenizers": "ratio", **{name: two[name] / one[name] for name in ("batch_1", "batch_16")}}]


def _answers(pair: tuple[CoLLM, DemoWorld]) -> list[dict[str, Any]]:
    model, world = pair
    found = []
    policies = {"base": SingleAuthorPolicy(0), "expert": SingleAuthorPolicy(1), "collaboration": None}
    for name, policy in policies.items():
        prompts = [row["prompt"] for row in world.test]
        done = model.generate(prompts, SamplingParams(max_tokens=64), policy=policy, max_batch=64)
        right = [exact_match(one.text, row["completion"]) for one, row in zip(done, world.test, strict=True)]
        interval = bootstrap_interval(right)
        shown = f"{interval.mean:.1%} ({100 * interval.low:.1f} - {100 * interval.high:.1f})"
        found.append({"system": name, "right": shown, "deferral_rate": done.deferral_rate})
    return [*found[:-1], found[-1] | _defer_probs(model, world)]


def _defer_probs(model: CoLLM, world: DemoWorld) -> dict[str, float]:
    """Mean defer prob at segments of facts and elsewhere, and both models' negative log-probability of facts.

    The log-probabilities are in nats per segment.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in world.test), encoding="utf-8")
        rows = load_rows(path)
    facts = {
        s.prompt: (len(world.separator + s.before) - 1, len(world.separator + s.before + s.fact))
        for s in world.statements
    }
    assert model.alignment is not None
    of_fact = []
    for row in rows:
        start, end = facts[str(row.prompt)]
        places = model.alignment.boundaries(row.completion.encode())
        of_fact += [a >= start and b <= end for a, b in itertools.pairwise(places)] + [False]
    views = gold_views(model, gold_examples(model, rows, max_length=128))
    at, deferring = torch.tensor(of_fact), defer_probs(views.defer_logits)
    return {
        "at_facts": deferring[at].mean().item(),
        "elsewhere": deferring[~at].mean().item(),
        "expert_nats": -views.assistant_logprobs[at, 0].mean().item(),
        "base_nats": -views.base_logprob[at].mean().item(),
    }


def _demo_pair(deferral_cost: float = 0.0, **options: Any) -> tuple[CoLLM, DemoWorld]:
    """Train a head for the demo's base and expert, and calibrate its threshold."""
    world = DemoWorld(seed=0, separator=" ")
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(world, Path(folder) / "models", seed=0, **options)
        for split in ("train", "validation"):
            rows = "".join(json.dumps(row) + "\n" for row in getattr(world, split))
            (Path(folder) / f"{split}.jsonl").write_text(rows, encoding="utf-8")
        config = RunConfig(
            base=str(models.base),
            assistant=[str(path) for path in models.experts],
            data=str(Path(folder) / "train.jsonl"),
            validation=str(Path(folder) / "validation.jsonl"),
            max_tokens=64,
            max_batch=64,
        )
        args = CoLLMConfig(
            output_dir=str(Path(folder) / "run"),
            method="head",
            max_length=128,
            num_train_epochs=8,
            per_device_train_batch_size=16,
            head_learning_rate=1e-2,
            deferral_cost=deferral_cost,
            save_strategy="no",
            use_cpu=True,
        )
        model = train_collaboration(config, args, quiet=True).model
        assert len(model.runners) == 2  # loads the models while the folder exists
    return model, world


def pairs_of_tokenizers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Count over all pairs of tokenizers and all texts."""
    fetch(options.tokenizers)
    loaded = {name: load(options.tokenizers, name) for name in PACKAGES}
    answers = [json.loads(line)["answer"] for line in options.data.read_text(encoding="utf-8").splitlines()]
    pairs = list(itertools.combinations(loaded, 2))
    rows = []
    for base, assistant in pairs:
        alignment = Alignment([loaded[base], loaded[assistant]])
        texts: dict[str, tuple[Sequence[str], bool]] = {
            "GSM8K": (answers, False),
            "GSM8K, growing": (answers[:300], True),
            "code": (code(), True),
            "Chinese": (CHINESE, True),
            "random": (list(fuzzed(0, options.fuzzed // len(pairs), alignment)), False),
        }
        counted = {name: count(alignment, one, growing=growing) for name, (one, growing) in texts.items()}
        rows.append(_row(base, assistant, counted))
        line = ", ".join(f"{name} {one.absent} absent {one.tokens_per_segment:.2f}" for name, one in counted.items())
        print(f"{base} > {assistant}: {line}", flush=True)
    return rows


if __name__ == "__main__":
    main()
