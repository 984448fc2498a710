"""Two processes on a CPU give what one gives: losses, measures, weights, the saved artefact, a resumed run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import DeepSpeedPlugin
from safetensors.torch import load_file

from tests.processes import collm, run_processes
from tests.training.conftest import Saved

ROOT = Path(__file__).parents[2]
WORKER = "tests.training.distributed_worker"
FSDP2 = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
    },
}
WRAPPED = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPJointModule",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}


def options_of(way: str) -> dict[str, Any]:
    """What makes training run that way; DeepSpeed's options are those of the configuration that is shipped."""
    if not way.startswith("zero"):
        return {"fsdp2": FSDP2, "ddp": {}}[way]
    shipped = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{way}.yaml").read_text())["deepspeed_config"]
    plugin = DeepSpeedPlugin(
        zero_stage=shipped["zero_stage"],
        gradient_accumulation_steps=shipped["gradient_accumulation_steps"],
        gradient_clipping=shipped["gradient_clipping"],
        offload_optimizer_device=shipped["offload_optimizer_device"],
        offload_param_device=shipped["offload_param_device"],
        zero3_init_flag=shipped.get("zero3_init_flag"),
        zero3_save_16bit_model=shipped.get("zero3_save_16bit_model"),
    )
    unused = [name for name, value in plugin.deepspeed_config.items() if value == float("inf")]  # no JSON
    return {"deepspeed": {name: value for name, value in plugin.deepspeed_config.items() if name not in unused}}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def train(out: Path, processes: int, **options: Any) -> dict[str, Any]:
    """Train in processes with the environment that `torchrun` gives them."""
    common = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    envs = [common]
    if processes > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        envs = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    for done in run_processes(WORKER, [str(out), json.dumps(options)], envs, ROOT):
        assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "result.json").read_text())


def largest_difference(mine: Path, theirs: Path) -> float:
    differences = [0.0]
    for file in ("base/model.safetensors", "head.safetensors"):
        one, other = load_file(mine / file), load_file(theirs / file)
        assert one.keys() == other.keys()
        differences += [float((one[name] - other[name]).abs().max()) for name in one]
    return max(differences)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One process that accumulates over two batches."""
    out = tmp_path_factory.mktemp("alone")
    return out, train(out, 1, gradient_accumulation_steps=2)


@pytest.mark.parametrize("way", WRAPPED)
def test_two_processes_train_and_measure_as_one(alone: tuple[Path, dict[str, Any]], tmp_path: Path, way: str) -> None:
    result = train(tmp_path, 2, **options_of(way))
    assert (result["wrapped"], result["processes"]) == (WRAPPED[way], 2)
    assert result["sharded"] == (3 if way == "fsdp2" else 0)  # the whole and each of its two layers
    measured, expected = result["measured"], dict(alone[1]["measured"])
    swaps = abs(measured.pop("eval_head_auc") - expected.pop("eval_head_auc"))
    assert swaps < 1e-3  # tokens whose defer probs differ by rounding may change places
    assert measured == pytest.approx(expected, rel=1e-5)
    assert largest_difference(tmp_path / "final", alone[0] / "final") < 1e-6


@pytest.mark.parametrize(
    "way", ["ddp", *(pytest.param(way, marks=pytest.mark.soak) for way in ("zero3", "fsdp2", "zero2"))]
)
def test_two_processes_resume_as_if_never_stopped(alone: tuple[Path, dict[str, Any]], tmp_path: Path, way: str) -> None:
    saving = {**options_of(way), "save_strategy": "steps", "save_steps": 2}
    train(tmp_path, 2, **saving, stop_after=2)
    shutil.rmtree(tmp_path / "final")
    train(tmp_path, 2, **saving, resume=True)
    assert largest_difference(tmp_path / "final", alone[0] / "final") < 1e-6


@pytest.mark.soak
def test_a_whole_run_in_two_processes_leaves_the_artefact_of_one(saved_model: Saved, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"w{i % 20} w{i % 7}", "completion": f"w{(i * 3) % 30} w{i % 11}"} for i in range(44)
    ]  # 40 to learn from, whole batches
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["train", "--base", str(saved_model("base", 0)), "--assistant", str(saved_model("assistant", 1))]
    common += ["--data", str(tmp_path / "train.jsonl"), "--max_tokens", "3", "--rates", "0", "0.5", "1"]
    common += ["--learning_rate", "1e-3", "--max_length", "32", "--use_cpu", "true", "--device", "cpu"]
    common += ["--pseudo_label_variant", "b"]
    common += ["--num_train_epochs", "1", "--save_strategy", "no", "--disable_tqdm", "true"]
    one = [*common, "--output_dir", "one", "--per_device_train_batch_size", "8"]
    two = [*common, "--output_dir", "two", "--per_device_train_batch_size", "4"]
    done = collm(*one, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, "-m", "collm", *two], cwd=tmp_path, env=environment, timeout=300, check=True)
    mine, theirs = tmp_path / "two/collaboration", tmp_path / "one/collaboration"
    assert sorted(path.name for path in mine.iterdir()) == sorted(path.name for path in theirs.iterdir())
    assert largest_difference(mine, theirs) < 1e-5
    scores = [sorted((tmp_path / run / "scores/base").glob("*.safetensors")) for run in ("one", "two")]
    for first, second in zip(*scores, strict=True):
        assert torch.equal(load_file(first)["logprob"], load_file(second)["logprob"])
    metrics = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("one", "two")]
    assert metrics[0]["warm_start"] == pytest.approx(metrics[1]["warm_start"], nan_ok=True)
