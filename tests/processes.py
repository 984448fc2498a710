"""Python processes that are forked from one that has imported everything, as importing takes several seconds."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = [
    "collm.run.train",
    "collm.cli.main",
    "collm.cli.train",
    "collm.evaluation.report",
    "collm.training.trainer",
    "collm.training.warm_start",
    "tests.tiny_models",
    "transformers.models.llama.modeling_llama",
    "transformers.integrations",
]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(PRELOADED)


def collm(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    (done,) = run_processes("collm", [str(argument) for argument in arguments], [{}], cwd)
    return done


def run_processes(
    module: str, arguments: Sequence[str], envs: Sequence[Mapping[str, str]], cwd: Path, timeout_s: float = 300
) -> list[subprocess.CompletedProcess[str]]:
    """Run `python -m module` in one process for each of `envs`, which change the environment, all at the same time."""
    command = [module, *arguments]
    with tempfile.TemporaryDirectory() as outputs:
        paths = [(Path(outputs, f"{i}.out"), Path(outputs, f"{i}.err")) for i in range(len(envs))]
        processes = [
            _FORKS.Process(target=_run, args=(command, str(cwd), {**os.environ, **env}, *path))
            for env, path in zip(envs, paths, strict=True)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_s
        try:
            for process in processes:
                process.join(max(0, deadline - time.monotonic()))
            if any(process.exitcode is None for process in processes):
                raise subprocess.TimeoutExpired(command, timeout_s, stderr=paths[0][1].read_bytes())
            return [
                subprocess.CompletedProcess(command, process.exitcode or 0, out.read_text(), err.read_text())
                for process, (out, err) in zip(processes, paths, strict=True)
            ]
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()


def _run(command: list[str], cwd: str, env: dict[str, str], out: Path, err: Path) -> None:
    gc.freeze()  # a collection would look at all that was imported, and copy its memory
    for path, descriptor in ((out, 1), (err, 2)):
        with path.open("wb") as stream:
            os.dup2(stream.fileno(), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv, sys.path[:0] = command, [cwd]
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
