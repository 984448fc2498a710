"""Time to compute the teacher-forced curve of all thresholds on random scores. Prints JSON."""

from __future__ import annotations

import argparse
import json
import time

import torch

from collm.evaluation.gold import teacher_forced
from collm.training.inspection import TokenViews


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    count = parser.parse_args().tokens
    torch.set_num_threads(1)
    correct, logprobs = torch.rand(3, count) < 0.5, -torch.rand(2, count)
    logits = torch.randn(count, 1)
    views = TokenViews(logprobs[0], correct[0], logprobs[1:].T, correct[1:2].T, logits, correct[2:].T)
    started = time.perf_counter()
    curve = teacher_forced(views)
    curve.best(0.3)
    seconds = time.perf_counter() - started
    print(json.dumps({"tokens": count, "thresholds": len(curve), "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
