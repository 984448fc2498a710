"""Starting vLLM servers on this machine, waiting for them and stopping them."""

from __future__ import annotations

import http.client
import logging
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from collm.errors import ConfigError, LoadError

_LOG = logging.getLogger(__name__)
_MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` needs metadata that CPU builds lack
GROUP = "vllm.logits_processors"
"""Entry point group in which vLLM looks for the plug-in."""
_POLL_S, _LOG_EVERY_S, _GRACE_S = 0.2, 10.0, 30.0


@dataclass(frozen=True)
class ServerPlan:
    """A server to start.

    Attributes:
        name: name of the author that it serves.
        model: a directory or a Hub repository id.
        flags: vLLM's flags, other than model and address.
        environment: environment variables in addition to those of this process.
    """

    name: str
    model: str
    flags: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def gpus(self) -> str:
        """The GPUs that the server may use, as in CUDA_VISIBLE_DEVICES."""
        return self.environment.get("CUDA_VISIBLE_DEVICES", "")


class ServerProcess:
    """A running server. `stop` ends it.

    Args:
        python: the interpreter that has vLLM.
        log: file for the server's output.
        address: the Unix socket on which it listens. Others must not be able to create it.
    """

    def __init__(self, plan: ServerPlan, python: str, log: Path, address: Path) -> None:
        self.plan = plan
        self.log = log
        self.address = address
        served = ["--model", plan.model, "--served-model-name", plan.name, "--uds", str(address)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [python, "-m", _MODULE, *served, *plan.flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **plan.environment},
                start_new_session=True,  # Ctrl-C must not reach the server, which this process stops
            )

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://{quote(str(self.address), safe='')}/v1"

    def wait(self, deadline: float) -> None:
        """Wait until the server answers. Raises a LoadError if it ends, or is not up by `deadline`, on the clock of
        `time.monotonic`.
        """
        started = logged = time.monotonic()
        while not self._answers():
            now = time.monotonic()
            if self.process.poll() is not None:
                raise LoadError(
                    f"the server of the {self.plan.name} ended with status {self.process.returncode} before it was up: "
                    f"{self._last_error()}; see {self.log}"
                )
            if now >= deadline:
                raise LoadError(
                    f"the server of the {self.plan.name} is not up after {now - started:.0f} s (model "
                    f"{self.plan.model}); wait longer, or see {self.log}"
                )
            if now - logged >= _LOG_EVERY_S:
                _LOG.info("waiting for the %s (%s), %.0f s so far", self.plan.name, self.plan.model, now - started)
                logged = now
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_POLL_S)

    def stop(self) -> None:
        """End the server and its child processes."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        health = http.client.HTTPConnection("localhost")
        with socket.socket(socket.AF_UNIX) as health.sock, suppress(OSError, http.client.HTTPException):
            health.sock.settimeout(2.0)
            health.sock.connect(str(self.address))
            health.request("GET", "/health")
            return health.getresponse().status == 200
        return False

    def _last_error(self) -> str:
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        errors = [line for line in lines if "Error" in line] or [line for line in lines if line] or ["no output"]
        return errors[-1][-300:]


def check_python(python: str, *, one_engine: bool = False) -> str:
    """Check that an interpreter has vLLM and the plug-in, and return its name.

    Args:
        one_engine: whether vLLM must also have what is listed in `hooks`.

    Raises:
        ConfigError: it lacks one of these, or is not an interpreter.
    """
    code = (
        f"import vllm; from importlib.metadata import entry_points as e; print(len(e(group={GROUP!r}, name='collm')))"
    )
    try:
        found = int(_run(python, code, check=True).stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
        raise ConfigError(
            f"{python} has no vLLM; install vLLM and collm-vllm (plugins/vllm) in a separate environment, and name its "
            "interpreter with --vllm-python"
        ) from error
    if not found:
        raise ConfigError(f"vLLM of {python} has no collm plug-in; install collm-vllm (plugins/vllm) beside it")
    if one_engine:
        done = _run(python, "from collm.vllm import hooks; hooks.check_hooks(); import collm.vllm.inline")
        if done.returncode:
            error_line = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise ConfigError(f"{python} cannot run base and assistant in one engine: {error_line}")
    return python


def _run(python: str, code: str, *, check: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=300, check=check)


@contextmanager
def launched(plans: Sequence[ServerPlan], python: str, logs: Path, *, wait_s: float) -> Iterator[list[ServerProcess]]:
    """Run servers while the block runs. Servers on one GPU start one after another, because each measures the free
    memory. They listen in a directory that only this user can enter, so no other user can reach or replace them.

    Args:
        python: the interpreter that has vLLM.
        logs: directory for the servers' output.
        wait_s: longest time until all are up.

    Raises:
        LoadError: a server ended, or is not up in time. No server is left running.
    """
    logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    running: list[ServerProcess] = []
    with tempfile.TemporaryDirectory(prefix="collm-") as sockets:
        try:
            for plan in plans:
                for other in running:
                    if plan.gpus and plan.gpus == other.plan.gpus:
                        other.wait(deadline)
                log, address = logs / f"{plan.name}.log", Path(sockets, f"{plan.name}.sock")
                running.append(ServerProcess(plan, python, log, address))
            for server in running:
                server.wait(deadline)
            yield running
        finally:
            for server in reversed(running):
                server.stop()
