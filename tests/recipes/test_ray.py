"""The script that joins machines, with programs in the place of Ray and vLLM that write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "ray" / "node.sh"
RAY = """
def init(address, log_to_driver): pass
def cluster_resources(): return {"CPU": 8.0, "GPU": GPUS}
"""


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """Where the calls are written; two machines of four GPUs are there."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ray", "vllm"):
        program = programs / name
        program.write_text(f'#!/bin/sh\necho "{name} $* as $VLLM_HOST_IP" >> "$CALLS"\n')
        program.chmod(0o755)
    python = shutil.which("python3")
    assert python is not None
    (programs / "python3").symlink_to(python)
    (tmp_path / "ray.py").write_text(RAY.replace("GPUS", "8.0"))
    return tmp_path / "calls"


def environment(calls: Path, wait_s: str = "60") -> dict[str, str]:
    found = f"{calls.parent / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, "PATH": found, "CALLS": str(calls), "PYTHONPATH": str(calls.parent), "WAIT_S": wait_s}


def run(calls: Path, *arguments: str, wait_s: str = "60") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments], env=environment(calls, wait_s), capture_output=True, text=True, timeout=60
    )


def test_the_head_starts_ray_then_vllm_over_all_machines_and_takes_ray_down(calls: Path) -> None:
    done = run(calls, "head", "10.0.0.1", "2", "4", "/models/big", "--max-model-len=4096")
    assert done.returncode == 0, done.stderr
    started, served, stopped = calls.read_text().splitlines()
    assert started == "ray start --head --port=6379 --node-ip-address=10.0.0.1 as 10.0.0.1"
    assert served.startswith("vllm serve /models/big --distributed-executor-backend=ray ")
    assert "--tensor-parallel-size=4 --pipeline-parallel-size=2" in served
    assert "--max-model-len=4096" in served
    assert stopped.startswith("ray stop")


def test_told_to_end_it_ends_vllm_then_ray(calls: Path) -> None:
    serving = "trap 'echo vllm ended >> \"$CALLS\"; exit 0' TERM\necho up\nwhile :; do sleep 0.05; done\n"
    (calls.parent / "bin" / "vllm").write_text(f"#!/bin/sh\n{serving}")
    with subprocess.Popen(
        [SCRIPT, "head", "10.0.0.1", "2", "4", "/models/big"],
        env=environment(calls),
        stdout=subprocess.PIPE,
        text=True,
    ) as head:
        assert head.stdout is not None
        assert head.stdout.readline() == "up\n"
        head.terminate()
        assert head.wait(60) == 0
    assert [line.split(" as ")[0] for line in calls.read_text().splitlines()[1:]] == ["vllm ended", "ray stop"]


def test_too_few_gpus_are_waited_for_no_longer_than_told(calls: Path) -> None:
    done = run(calls, "head", "10.0.0.1", "4", "4", "/models/big", wait_s="0")
    assert done.returncode == 1
    assert "8 GPUs of 16 are there after 0 s" in done.stderr
    assert "vllm" not in calls.read_text()
    assert calls.read_text().splitlines()[-1].startswith("ray stop")


def test_a_worker_joins_the_head(calls: Path) -> None:
    assert run(calls, "worker", "10.0.0.2", "10.0.0.1").returncode == 0
    expected = "ray start --block --address=10.0.0.1:6379 --node-ip-address=10.0.0.2 as 10.0.0.2\n"
    assert calls.read_text() == expected


@pytest.mark.parametrize("arguments", [(), ("worker",), ("worker", "10.0.0.2"), ("tail", "10.0.0.2")])
def test_other_calls_are_refused(calls: Path, arguments: tuple[str, ...]) -> None:
    done = run(calls, *arguments)
    assert done.returncode != 0
    assert done.stderr
    assert not calls.exists()
