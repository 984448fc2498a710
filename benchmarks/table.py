"""Write the results of benchmarks into the tables of a page, between its markers.

python -m benchmarks.table docs/performance.md benchmarks/results/cpu-llama.json benchmarks/results/cpu-quantized.json
python -m benchmarks.table docs/training.md benchmarks/results/cpu-training.json
python -m benchmarks.table docs/serving.md benchmarks/results/cpu-serve.json benchmarks/results/cpu-serve-bodies.json
python -m benchmarks.table docs/scaling.md benchmarks/results/cpu-vllm.json
python -m benchmarks.table docs/tokenizers.md benchmarks/results/segments.json benchmarks/results/cpu-segments.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
GRID = {
    "prompt": "prompt",
    "batch": "batch",
    "aimed_rate": "deferral rate",
    "run": "run",
    "time_over_limit": "time / limit",
    "speed_vs_assistant_ours": "vs assistant, our loop",
    "speed_vs_assistant_generate": "vs assistant, `generate`",
    "speed_vs_base_ours": "vs base, our loop",
    "lookahead_speedup": "with lookahead",
    "assistant_passes": "assistant passes",
}
ALONE = {
    "prompt": "prompt",
    "batch": "batch",
    "base_ours_vs_generate": "base: ours vs `generate`",
    "assistant_ours_vs_generate": "assistant: ours vs `generate`",
}
LOOKAHEAD = {
    "agreement": "agreement",
    "rate": "deferral rate",
    "run": "run",
    "lookahead_speedup": "with lookahead",
    "assistant_passes": "assistant passes",
    "assistant_passes_ahead": "with lookahead",
}
LLAMA = {
    "type": "type",
    "prompt": "prompt",
    "batch": "batch",
    "aimed_rate": "deferral rate",
    "run": "run",
    "alone_bare_ms": "assistant alone, bare, ms",
    "alone_vs_bare": "alone: collm / bare",
    "pair_vs_bare": "pair: collm / bare",
    "bare_vs_alone": "bare pair / alone",
    "pair_vs_alone": "collm pair / alone",
    "lookahead_speedup": "with lookahead",
    "pair_vs_transformers": "vs transformers",
    "drafting_0.5_vs_alone": "drafting at 0.5 / alone",
    "drafting_0.8_vs_alone": "drafting at 0.8 / alone",
}
QUANTIZED = {
    "type": "type",
    "megabytes": "MB",
    "nll_nats": "NLL, nats",
    "right": "right results",
    "answers_changed": "answers changed",
    "tokens_changed": "tokens changed",
    "deferral_rate": "by the calculator",
    "seconds": "seconds",
}
CONTEXT = {"context": "context", "ms_per_token": "ms per token", "over_bare_pass": "over a bare pass"}

MEMORY = {
    "vocabulary": "vocabulary",
    "plain_mb": "all logits, MB",
    "chunks_mb": "chunks, MB",
    "memory_ratio": "memory ratio",
    "time_ratio": "time ratio",
}
STEP = {"target_share": "share of targets", "steps": "steps", "step_ratio": "time / plain fine-tuning"}
PADDING = {"shortest": "shortest", "longest": "longest", "padding_free_ratio": "time / padded"}
SCORING = {"model": "model", "longest": "longest", "examples": "examples", "scoring_ratio": "speed / one at a time"}
THROUGHPUT = {"batch": "streams at once", "speed_vs_engine": "speed / engine", "tokens_per_second": "tokens per second"}
PROCESSORS = {"batch": "batch", "asked": "requests with", "seconds": "seconds", "time_vs_plain": "time / plain"}
LOAD = {
    "round": "round",
    "finished": "finished",
    "left": "left early",
    "errors": "errors",
    "open_slots": "slots open after",
    "resident_mb": "memory, MB",
}
BODIES = {
    "shape": "body",
    "status": "status",
    "seconds": "answered after, s",
    "longest_health_s": "longest wait for /health, s",
}
SERVERS = {
    "batch": "at once",
    "deferral_rate": "deferral rate",
    "requests_per_token": "requests per token",
    "speed_vs_per_token": "vs a request per token",
    "deferral_rate_per_token": "its deferral rate",
    "speed_vs_assistant": "vs assistant alone",
    "speed_vs_base": "vs base alone",
    "speed_vs_memory": "vs in memory",
}
PAIRS = {
    "pair": "base > assistant",
    "gsm8k": "GSM8K",
    "hindsight": "in hindsight",
    "code": "Python",
    "chinese": "Chinese",
    "boundaries": "boundaries tried",
    "absent": "absent",
    "changed": "read again",
}
ENDS = {
    "expert": "the expert",
    "system": "system",
    "right": "whole answers right",
    "deferral_rate": "deferral rate",
    "at_facts": "defer prob at facts",
    "elsewhere": "elsewhere",
    "expert_nats": "expert's nats at facts",
    "base_nats": "base's",
}
SPEED = {"tokenizers": "tokenizers", "batch_1": "batch 1", "batch_16": "batch 16"}
CACHE = {"batch": "batch", "longest_prompt": "longest prompt", "held_over_needed": "held / needed"}
WAYS = {
    "way": "served as",
    "deferral_rate": "deferral rate",
    "batch": "at once",
    "tokens_per_second": "tokens/s",
    "speed_vs_assistant": "vs assistant alone",
}
FORECAST = {
    "pair": "bfloat16, one H100",
    "deferral_rate": "deferral rate",
    "base_ms": "base's step, ms",
    "assistant_ms": "assistant's, ms",
    "best_passes": "best number of passes",
    "forecast_vs_assistant": "vs assistant alone",
}
PARTS = [
    ("ways", "Tokens per second, each way with all threads:", WAYS),
    ("separate", "The same with a server for each model:", WAYS),
    (
        "forecast",
        "What a round would give on a GPU that is bound by reading weights (arithmetic, not measured):",
        FORECAST,
    ),
    ("bodies", "Bodies of 4 MiB, or as many values as the limit allows, while another client asks `/health`:", BODIES),
    ("comparison", "Tokens per second of `collm` across servers, as ratios:", SERVERS),
    ("throughput", "The same requests over HTTP, compared with the engine alone:", THROUGHPUT),
    ("processors", "Time of the engine with penalties and a JSON schema, for the same number of tokens:", PROCESSORS),
    ("load", "Rounds of many streams of mixed lengths. Some clients disconnect early:", LOAD),
    ("memory", "Memory of the loss, forward and backward, beyond the memory in use before it:", MEMORY),
    ("step", "Time of an optimizer step, compared with transformers' Trainer and the model's own loss:", STEP),
    ("padding", "Time of an optimizer step without padding, compared with padding:", PADDING),
    ("scoring", "Scoring speed, compared with one example at a time:", SCORING),
    ("lookahead", "Lookahead with one sequence, by how often the models agree:", LOOKAHEAD),
    ("llama", "SmolLM2 in llama.cpp, its first 10 layers as base and all 30 as assistant, speeds as ratios:", LLAMA),
    ("quantized", "The demo's collaboration in each type, changes against the first:", QUANTIZED),
    ("context", "Time per token as the context grows, while the base writes:", CONTEXT),
    ("cache", "KV cache memory of sequences of mixed lengths, 48 steps after their prompts, at a rate of 0.3:", CACHE),
    ("pairs", "Base tokens per segment:", PAIRS),
    ("ends", "The world of facts, 117 questions about entities that no training row names:", ENDS),
    ("speed", "Microseconds per byte of the answers, with lookahead where it has an effect:", SPEED),
]


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "--:|" * len(columns)]
    return lines + ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def section(path: Path) -> list[str]:
    """All results of one run, below the command that reproduces them."""
    result = json.loads(path.read_text())
    given, versions = result["arguments"], result["versions"]
    made_on = f"{given.get('threads', 1)} threads, torch {versions['torch']}, transformers {versions['transformers']}"
    models = f"{given['base'].upper()} + {given['assistant'].upper()}" if "base" in given else "Layers"
    dtype = given.get("dtype", "float32" if "base" in given else "float32 and bfloat16")
    heading = f"{models}, {dtype}, {given.get('device', 'cpu')}"
    if "ways" in result:
        heading += ", on vLLM"
    if "tokenizers" in given:
        heading = "Tokenizers" if "pairs" in given["parts"] else "The models of facts"
    if named := [name for part, name in (("llama", "llama.cpp"), ("quantized", "Types of weights")) if part in result]:
        heading = named[0]
    lines = [
        f"### {heading}",
        "",
        f"`{result['command']}` ({made_on}):",
        "",
    ]
    if rows := result.get("grid"):
        alone = [row for row in rows if row["aimed_rate"] == rows[0]["aimed_rate"] and row["run"] == 1]
        lines += [
            *table(rows, GRID),
            "",
            *_cache_free(rows, given["new"]),
            "Each model alone:",
            "",
            *table(alone, ALONE),
            "",
        ]
    for part, title, columns in PARTS:
        if part in result:
            lines += [title, "", *table(result[part], columns), ""]
    return lines


def _cache_free(rows: list[dict[str, Any]], new: int) -> list[str]:
    return [
        f"Speed compared with a loop without a KV cache, prompt {row['prompt']}, {new} new tokens, rate 0.3: "
        f"**{row['speed_vs_cache_free']:.1f}x**.\n"
        for row in rows
        if "speed_vs_cache_free" in row
    ]


def main() -> None:
    path = Path(sys.argv[1])
    page = path.read_text()
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    sections = [line for name in sys.argv[2:] for line in section(Path(name))]
    path.write_text(head + BEGIN + "\n\n" + "\n".join(sections) + END + tail)


if __name__ == "__main__":
    main()
