"""A run of the paper, rehearsed: its configuration with other models and few rows, through every command.

    python -m recipes.paper.rehearse gsm8k --model DIR --data DIR --out runs/rehearsal

The configuration is the run's own file with the fields of `replaced` changed. Each command is printed before it is run,
and the first one that fails ends the rehearsal.
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

FOLDER = Path(__file__).parent
RUNS = ("gsm8k", "math", "bioasq", "tulu")
QUESTION = "What is 3 + 4?"
_SERVED_S = 120


def replaced(base: Path, assistant: Path, data: Path, out: Path) -> dict[str, Any]:
    """What a rehearsal changes of a run's configuration: models and sizes."""
    return {
        "base": str(base),
        "assistant": str(assistant),
        "data": str(data),
        "output_dir": str(out),
        "bf16": False,
        "use_cpu": True,
        "dtype": "float32",
        "max_length": 512,
        "max_new_tokens": 32,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }


def first_layers(model: Path, count: int, out: Path) -> Path:
    """A base cheap enough to be tuned anywhere: the first layers of a model, with its tokenizer."""
    if not out.exists():
        spec = ModelSpec(str(model), dtype="float32", device="cpu")
        cut = load_model(spec)
        cut.model.layers = cut.model.layers[:count]
        cut.config.num_hidden_layers = count
        with atomic_directory(out) as directory:
            cut.save_pretrained(directory)
            load_tokenizer(spec).save_pretrained(directory)
    return out


def few_rows(data: Path, count: int, out: Path) -> Path:
    """The first rows of a file of JSON Lines, or the first questions of a BioASQ file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = data.read_text(encoding="utf-8")
    if data.suffix == ".jsonl":
        kept = "".join(line + "\n" for line in text.splitlines()[:count])
    else:
        whole = json.loads(text)
        kept = json.dumps({**whole, "questions": whole["questions"][:count]})
    with atomic_file(out) as temporary:
        temporary.write_text(kept, encoding="utf-8")
    return out


def rehearse(run: str, model: Path, data: Path, out: Path, *, rows: int, layers: int) -> dict[str, float]:
    """Every command of a run; the seconds that each took.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    base = first_layers(model, layers, out / "base")
    kept = few_rows(data, rows, out / f"rows{data.suffix}")
    written = yaml.safe_load((FOLDER / f"{run}.yaml").read_text(encoding="utf-8"))
    config = out / "run.yaml"
    with atomic_file(config) as temporary:
        temporary.write_text(yaml.safe_dump(written | replaced(base, model, kept, out / "run")), encoding="utf-8")
    collaboration = out / "run" / "collaboration"
    chat = ["--chat"] if run == "tulu" else []
    task = ["--task", "rows", "--metric", "token_f1", "--max-new-tokens", "32"] if run == "tulu" else ["--task", run]
    commands = {
        "score": ["score", "--config", config, "--author", "assistant-1"],
        "train": ["train", "--config", config],
        "inspect": ["score", "--inspect", out / "run" / "scores"],
        "calibrate": ["calibrate", collaboration],
        "eval": ["eval", collaboration, *task, "--data", kept, "--limit", "4", "--out", out / "eval", *chat],
        "generate": ["generate", collaboration, QUESTION, "--max-new-tokens", "16", *chat],
    }
    seconds = {name: _run(command) for name, command in commands.items()}
    return seconds | {"serve": _serve(collaboration)}


def _run(command: Sequence[object]) -> float:
    whole = [sys.executable, "-m", "collm", *map(str, command)]
    print("$ collm", *whole[3:], flush=True)
    started = time.monotonic()
    subprocess.run(whole, check=True)
    return round(time.monotonic() - started, 1)


def _serve(collaboration: Path) -> float:
    """Start the server, ask it once, and stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    whole = [sys.executable, "-m", "collm", "serve", str(collaboration), "--port", str(port)]
    print("$ collm", *whole[3:], flush=True)
    started = time.monotonic()
    server = subprocess.Popen(whole)
    try:
        while not _is_ready(port):
            if server.poll() is not None or time.monotonic() - started > _SERVED_S:
                raise subprocess.CalledProcessError(server.returncode or 1, whole)
            time.sleep(0.5)
        body = {"model": collaboration.name, "prompt": QUESTION, "max_tokens": 8}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=_SERVED_S)
        answer.raise_for_status()
        print(json.dumps(answer.json()["choices"][0]), flush=True)
    finally:
        server.terminate()
        server.wait(30)
    return round(time.monotonic() - started, 1)


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", choices=RUNS)
    parser.add_argument(
        "--model", type=Path, required=True, help="in the place of the assistant; its layers make the base"
    )
    parser.add_argument("--data", type=Path, required=True, help="rows in the form in which the set is published")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--layers", type=int, default=6, help="of the base")
    options = parser.parse_args(arguments)
    seconds = rehearse(options.run, options.model, options.data, options.out, rows=options.rows, layers=options.layers)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
