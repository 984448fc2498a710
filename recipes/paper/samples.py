"""Made-up rows in the format of each training set, for a rehearsal without data."""

from __future__ import annotations

from typing import Any

SAMPLES: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {
            "question": f"Ann has {n} boxes of 2 eggs. How many eggs?",
            "answer": f"{n}*2=<<{n}*2={2 * n}>>{2 * n}\n#### {2 * n}",
        }
        for n in range(12)
    ],
    "math": [
        {
            "problem": f"What is ${n}+1$?",
            "solution": f"We add one, so the answer is $\\boxed{{{n + 1}}}$.",
            "level": "Level 1",
        }
        for n in range(12)
    ],
    "bioasq": [
        {
            "id": str(n),
            "type": ["factoid", "list", "yesno", "summary"][n % 4],
            "body": f"Which gene is number {n}?",
            "ideal_answer": [f"The gene is G{n}."],
            "exact_answer": ["yes"] if n % 4 == 2 else [[f"G{n}"]],
        }
        for n in range(12)
    ],
    "tulu": [
        {
            "dataset": "own",
            "id": str(n),
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Say {n}."},
                {"role": "assistant", "content": f"{n}"},
                {"role": "user", "content": "And one more?"},
                {"role": "assistant", "content": f"{n + 1}"},
            ],
        }
        for n in range(12)
    ],
}
