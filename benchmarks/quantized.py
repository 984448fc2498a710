"""What the type of a base's weights changes: the collaboration of `collm demo`, written as GGUF in each type.

collm demo --out demo
python -m benchmarks.quantized demo --out benchmarks/results/cpu-quantized.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch

from benchmarks.record import run_parts
from collm import CoLLM, SamplingParams
from collm.artefact import load_parts
from collm.core.objective import marginal_logprobs
from collm.demo.arithmetic import KINDS, UNSEEN, sums
from collm.evaluation.gold import gold_examples, gold_views
from collm.evaluation.metrics import last_number
from collm.models.gguf_export import GgufType
from collm.run.calibrate import PastRun

TESTED = 36
PARAMS = SamplingParams(max_tokens=64)


def rows_of(out: Path, seed: int, threshold: float) -> list[dict[str, Any]]:
    """NLL on the validation rows, and answers to the demo's test questions, for each type."""
    past = PastRun.read(out / "run")
    held_out = past.rows()
    questions = [*sums(KINDS, TESTED, seed + 1), *sums(UNSEEN, TESTED, seed + 1)]
    prompts = [[{"role": "user", "content": one.question}] for one in questions]
    rows: list[dict[str, Any]] = []
    first: list[list[int]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for kind in get_args(GgufType):
            made = Path(temporary) / kind
            load_parts(out / "run" / "collaboration").save_pretrained(made, gguf=kind)
            model = CoLLM.from_pretrained(made, device="cpu")
            views = gold_views(model, gold_examples(model, held_out))
            terms = views.base_logprob, views.assistant_logprobs, views.defer_logits
            start = time.perf_counter()
            answers = model.generate(prompts, PARAMS, threshold=threshold)
            taken = time.perf_counter() - start
            written = [answer.token_ids for answer in answers]
            first = first or written
            right = [last_number(answer.text, one.answer) for answer, one in zip(answers, questions, strict=True)]
            changed = sum(_different(own, of_first) for own, of_first in zip(written, first, strict=True))
            rows.append(
                {
                    "type": kind,
                    "megabytes": round((made / "gguf" / "base.gguf").stat().st_size / 1e6),
                    "nll_nats": -float(marginal_logprobs(*terms).mean()),
                    "right": fmean(right),
                    "answers_changed": sum(own != of_first for own, of_first in zip(written, first, strict=True)),
                    "tokens_changed": changed / sum(map(len, first)),
                    "deferral_rate": answers.deferral_rate,
                    "seconds": taken,
                }
            )
    return rows


def _different(own: list[int], first: list[int]) -> int:
    """Number of places at which two answers have other tokens."""
    longest = max(len(own), len(first))
    return longest - sum(one == other for one, other in zip(own, first, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="directory of `collm demo`")
    parser.add_argument("--seed", type=int, default=0, help="that of the demo")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run_parts(
        "benchmarks.quantized",
        arguments,
        {"quantized": lambda: rows_of(arguments.demo, arguments.seed, arguments.threshold)},
    )


if __name__ == "__main__":
    main()
