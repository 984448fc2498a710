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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from collm.errors import ConfigError, LoadError

_LOG = logging.getLogger(__name__)
_MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` needs metadata that CPU builds lack
GROUP = "vllm.logits_processors"
"""Entry point group in which vLLM looks for the plug-in."""
_POLL_S, _LOG_EVERY_S, _GRACE_S = 0.2, 10.0, 30.0


@dataclass(eq=False)
class ServerProcess:
    """A server on a Unix socket. `start` runs it, and `stop` ends it.

    Attributes:
        name: name of the author that it serves.
        model: a directory or a Hub repository id.
        flags: vLLM's flags, other than model and address.
        environment: environment variables in addition to those of this process.
        url: the base URL, once it is started.
    """

    name: str
    model: str
    flags: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    url: str = field(default="", init=False)

    def start(self, python: str, logs: Path, sockets: Path) -> None:
        """Start the server with vLLM of this interpreter. Others must not be able to write to `sockets`."""
        self.log, self.address = logs / f"{self.name}.log", sockets / f"{self.name}.sock"
        self.url = f"http://{quote(str(self.address), safe='')}/v1"
        served = ["--model", self.model, "--served-model-name", self.name, "--uds", str(self.address)]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [python, "-m", _MODULE, *served, *self.flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.environment},
                start_new_session=True,  # Ctrl-C must not reach the server, which this process stops
            )

    def wait(self, deadline: float) -> None:
        """Wait until the server answers. Raises a LoadError if it ends, or is not up by `deadline` (monotonic)."""
        started = logged = time.monotonic()
        while not self._answers():
            now = time.monotonic()
            if self.process.poll() is not None:
                lines = list(filter(None, map(str.strip, self.log.read_text("utf-8", "replace").splitlines())))
                errors = [line for line in lines if "Error" in line] or lines or ["no output"]
                raise LoadError(
                    f"the server of the {self.name} ended with status {self.process.returncode} before it was up: "
                    f"{errors[-1][-300:]}; see {self.log}"
                )
            if now >= deadline:
                raise LoadError(
                    f"the server of the {self.name} is not up after {now - started:.0f} s (model {self.model}); wait "
                    f"longer, or see {self.log}"
                )
            if now - logged >= _LOG_EVERY_S:
                _LOG.info("waiting for the %s (%s), %.0f s so far", self.name, self.model, now - started)
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


def check_python(python: str, *, one_engine: bool = False) -> str:
    """Return the name of an interpreter. Raises a ConfigError if it lacks vLLM, the plug-in or, for one engine, what
    `hooks` lists.
    """
    plugin = f"from importlib.metadata import entry_points as e; raise SystemExit(not e(group={GROUP!r}, name='collm'))"
    checks = {
        "import vllm": "{python} has no vLLM; install vLLM and collm-vllm (plugins/vllm) in a separate environment, "
        "and name its interpreter with --vllm-python",
        plugin: "vLLM of {python} has no collm plug-in; install collm-vllm (plugins/vllm) beside it",
    }
    if one_engine:
        code = "from collm.vllm import hooks; hooks.check_hooks(); import collm.vllm.inline"
        checks[code] = "{python} cannot run base and assistant in one engine: {error}"
    for code, problem in checks.items():
        try:
            subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=300, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            lines = (getattr(error, "stderr", None) or "no output").strip().splitlines()
            raise ConfigError(problem.format(python=python, error=lines[-1])) from error
    return python


@contextmanager
def launched(
    servers: Sequence[ServerProcess], python: str, logs: Path, *, wait_s: float
) -> Iterator[Sequence[ServerProcess]]:
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
    with tempfile.TemporaryDirectory(prefix="collm-") as sockets, ExitStack() as running:
        for place, server in enumerate(servers):
            gpus = server.environment.get("CUDA_VISIBLE_DEVICES")
            for other in servers[:place]:
                if gpus and gpus == other.environment.get("CUDA_VISIBLE_DEVICES"):
                    other.wait(deadline)
            server.start(python, logs, Path(sockets))
            running.callback(server.stop)
        for server in servers:
            server.wait(deadline)
        yield servers
