"""Rehearsal of a run of the paper: every command, with the run's configuration but other models and few rows.

    python -m recipes.paper.rehearse gsm8k --model DIR --data DATA --out runs/rehearsal

The configuration is the run's own file with the fields of `replaced` changed. Each command is printed before it runs.
The first command that fails ends the rehearsal.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from collm.atomic import atomic_directory, atomic_file
from collm.models.loading import ModelSpec, load_model, load_tokenizer
from collm.training.data import load_records, load_rows
from collm.training.formats import format_named
from recipes.paper.samples import SAMPLES

FOLDER = Path(__file__).parent
FORMATS = {
    "gsm8k": "gsm8k",
    "math": "recipes.paper.formats:MATH",
    "bioasq": "recipes.paper.formats:BIOASQ",
    "tulu": "tulu",
}
TASKS = {
    "gsm8k": ["gsm8k"],
    "math": ["recipes.paper.hendrycks_math:HendrycksMath"],
    "bioasq": ["recipes.paper.bioasq:Bioasq"],
    "tulu": ["rows", "--metric", "token_f1", "--max-tokens", "32"],
}
QUESTION = "What is 3 + 4?"
THRESHOLD = 0.5
"""A threshold at which both models write. On a few rows, calibration may choose one that never defers."""
_SERVE_TIMEOUT_S = 600


def replaced(base: Path, assistant: Path, data: Path, out: Path) -> dict[str, Any]:
    """The fields of a run's configuration that a rehearsal changes: models and sizes."""
    return {
        "base": str(base),
        "assistant": str(assistant),
        "data": str(data),
        "output_dir": str(out),
        "bf16": False,
        "use_cpu": True,
        "dtype": "float32",
        "max_length": 512,
        "max_tokens": 32,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }


def first_layers(model: Path, count: int, out: Path) -> Path:
    """Save the first layers of a model, with its tokenizer, as a base that is cheap to tune."""
    if not out.exists():
        spec = ModelSpec(str(model), dtype="float32", device="cpu")
        cut = load_model(spec)
        cut.model.layers = cut.model.layers[:count]
        cut.config.num_hidden_layers = count
        with atomic_directory(out) as directory:
            cut.save_pretrained(directory)
            load_tokenizer(spec).save_pretrained(directory)
    return out


def few_rows(run: str, data: str | None, count: int) -> list[dict[str, Any]]:
    """The first rows of a data set, in any format that `collm train` reads; made-up rows if there is none."""
    if data is None:
        return SAMPLES[run][:count]
    return [dict(row) for _, row in load_records(data, format=FORMATS[run])[:count]]


def written_rows(run: str, rows: list[dict[str, Any]], out: Path) -> Path:
    """Write rows to a file in the format of the data set, each on a new line. The format determines the suffix."""
    key = format_named(FORMATS[run]).key
    path = out.with_suffix(".json" if key else ".jsonl")
    with atomic_file(path) as temporary:
        lines = json.dumps({key: rows}, indent=1) if key else "".join(json.dumps(row) + "\n" for row in rows)
        temporary.write_text(lines, encoding="utf-8")
    return path


def good_rows(run: str, data: Path) -> list[dict[str, Any]]:
    """The rows of a file without those that training skips. Evaluation would stop at them."""
    good = {row.where for row in load_rows(data, format=FORMATS[run], bad_rows="skip")}
    return [dict(row) for where, row in load_records(data, format=FORMATS[run]) if where in good]


def rehearse(run: str, model: Path, data: str | None, out: Path, *, rows: int, layers: int) -> dict[str, float]:
    """Run every command of a run. Returns the seconds that each took.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    base = first_layers(model, layers, out / "base")
    few = written_rows(run, few_rows(run, data, rows), out / "rows")
    good = written_rows(run, good_rows(run, few), out / "good-rows")
    original = yaml.safe_load((FOLDER / f"{run}.yaml").read_text(encoding="utf-8"))
    config = out / "run.yaml"
    with atomic_file(config) as temporary:
        temporary.write_text(yaml.safe_dump(original | replaced(base, model, few, out / "run")), encoding="utf-8")
    collaboration = out / "run" / "collaboration"
    chat = ["--chat"] if run == "tulu" else []
    task, options = ["--task", *TASKS[run]], [*chat, "--threshold", THRESHOLD]
    commands = {
        "score": ["score", "--config", config, "--author", "assistant", "--trust-code"],
        "train": ["train", "--config", config, "--trust-code"],
        "forecast": ["forecast", "--scores", out / "run" / "scores"],
        "calibrate": ["calibrate", collaboration, "--trust-code"],
        "eval": ["eval", collaboration, *task, "--data", good, "--limit", "4", "--out", out / "eval", *options],
        "generate": ["generate", collaboration, QUESTION, "--max-tokens", "16", *options],
    }
    seconds = {name: run_command(command) for name, command in commands.items()}
    return seconds | {"serve": serve_once(collaboration, chat=bool(chat))}


def run_command(command: Sequence[object]) -> float:
    arguments = [sys.executable, "-m", "collm", *map(str, command)]
    print("$ collm", *arguments[3:], flush=True)
    started = time.monotonic()
    subprocess.run(arguments, check=True)
    return round(time.monotonic() - started, 1)


def serve_once(collaboration: Path, *, chat: bool) -> float:
    """Start the server, send one request, and stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "collm", "serve", str(collaboration), "--port", str(port)]
    print("$ collm", *command[3:], flush=True)
    started = time.monotonic()
    server = subprocess.Popen(command)
    try:
        while not _is_ready(port):
            if server.poll() is not None or time.monotonic() - started > _SERVE_TIMEOUT_S:
                raise subprocess.CalledProcessError(server.returncode or 1, command)
            time.sleep(0.5)
        route, field = ("chat/completions", "messages") if chat else ("completions", "prompt")
        question = [{"role": "user", "content": QUESTION}] if chat else QUESTION
        body = {"model": collaboration.name, field: question, "max_tokens": 8, "collm": {"threshold": THRESHOLD}}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/{route}", json=body, timeout=_SERVE_TIMEOUT_S)
        answer.raise_for_status()
        print(json.dumps(answer.json()["choices"][0]), flush=True)
    finally:
        server.terminate()
        server.wait(_SERVE_TIMEOUT_S)
    return round(time.monotonic() - started, 1)


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", choices=FORMATS)
    parser.add_argument(
        "--model", type=Path, required=True, help="model to use as the assistant; its first layers become the base"
    )
    parser.add_argument("--data", help="data set in any format that collm train reads; made-up rows by default")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--layers", type=int, default=6, help="number of layers of the base")
    options = parser.parse_args(arguments)
    seconds = rehearse(options.run, options.model, options.data, options.out, rows=options.rows, layers=options.layers)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
