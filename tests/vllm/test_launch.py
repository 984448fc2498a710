"""Server processes: waited for, bounded, and none left behind."""

from __future__ import annotations

import os
import signal
import stat
import sys
from pathlib import Path

import psutil
import pytest

from collm.errors import ConfigError, LoadError
from collm.vllm.launch import ServerProcess, check_python, launched

SERVER = """
import http.server, os, signal, socketserver, subprocess, sys

behaviour = os.environ["BEHAVIOUR"]
if behaviour == "dies":
    print("RuntimeError: no room for the weights")
    sys.exit(3)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
with open(os.environ["PIDS"], "a") as file:
    print(os.getpid(), child.pid, file=file)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if behaviour == "never" else 200)
        self.end_headers()

    def log_message(self, *_):
        pass


socketserver.ThreadingUnixStreamServer(sys.argv[sys.argv.index("--uds") + 1], Handler).serve_forever()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In which `python -m vllm.entrypoints.openai.api_server` is the program above."""
    package = tmp_path / "fake" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(SERVER)
    return {"PYTHONPATH": str(tmp_path / "fake"), "PIDS": str(tmp_path / "pids"), "BEHAVIOUR": "fine"}


def plan(environment: dict[str, str], behaviour: str = "fine", name: str = "base", **more: str) -> ServerProcess:
    return ServerProcess(name, "some-model", ["--seed", "1"], {**environment, "BEHAVIOUR": behaviour, **more})


def processes(environment: dict[str, str]) -> list[psutil.Process]:
    """That run, of those that were started, children of servers included."""
    pids = map(int, Path(environment["PIDS"]).read_text().split())
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def gone(environment: dict[str, str]) -> bool:
    return not psutil.wait_procs(processes(environment), timeout=10)[1]


def test_servers_are_up_in_the_block_and_gone_after_it(environment: dict[str, str], tmp_path: Path) -> None:
    plans = [plan(environment), plan(environment, name="assistant")]
    with launched(plans, sys.executable, tmp_path / "logs", wait_s=60) as running:
        assert len(processes(environment)) == 4
        assert len({server.url for server in running}) == 2
        command = Path(f"/proc/{running[1].process.pid}/cmdline").read_text().split("\0")
        assert command[command.index("--served-model-name") + 1] == "assistant"
        assert command[command.index("--seed") + 1] == "1"
    assert gone(environment)
    assert sorted(file.name for file in (tmp_path / "logs").iterdir()) == ["assistant.log", "base.log"]


def test_no_other_user_can_reach_or_replace_them(environment: dict[str, str], tmp_path: Path) -> None:
    with launched([plan(environment)], sys.executable, tmp_path / "logs", wait_s=60) as (server,):
        directory = server.address.parent
        assert (directory.stat().st_uid, stat.S_IMODE(directory.stat().st_mode)) == (os.getuid(), 0o700)
        assert stat.S_ISSOCK(server.address.stat().st_mode)
        assert not any(one.net_connections("inet") for one in processes(environment))
    assert not directory.exists()


def test_one_that_dies_says_why_and_takes_the_others_down(environment: dict[str, str], tmp_path: Path) -> None:
    plans = [plan(environment), plan(environment, "dies", "assistant")]
    with (
        pytest.raises(
            LoadError, match=r"of the assistant ended with status 3 .*no room for the weights; .*assistant\.log"
        ),
        launched(plans, sys.executable, tmp_path / "logs", wait_s=60),
    ):
        pass
    assert gone(environment)


def test_waiting_is_bounded_and_says_for_what(environment: dict[str, str], tmp_path: Path) -> None:
    with (
        pytest.raises(LoadError, match=r"of the base is not up after 1 s \(model some-model\); wait longer"),
        launched([plan(environment, "never")], sys.executable, tmp_path / "logs", wait_s=1),
    ):
        pass
    assert gone(environment)


def test_one_that_ignores_the_signal_is_killed(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collm.vllm.launch._GRACE_S", 0.5)
    with launched([plan(environment, "stubborn")], sys.executable, tmp_path / "logs", wait_s=60):
        assert len(processes(environment)) == 2
    assert gone(environment)


def test_an_interrupt_takes_them_down(environment: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), launched([plan(environment)], sys.executable, tmp_path, wait_s=60):
        signal.raise_signal(signal.SIGINT)
    assert gone(environment)


def test_those_on_one_gpu_start_one_by_one(environment: dict[str, str], tmp_path: Path) -> None:
    first = plan(environment, "never", CUDA_VISIBLE_DEVICES="0")
    plans = [first, plan(environment, name="assistant", CUDA_VISIBLE_DEVICES="0")]
    with pytest.raises(LoadError, match="base is not up"), launched(plans, sys.executable, tmp_path / "logs", wait_s=1):
        pass
    assert not (tmp_path / "logs" / "assistant.log").exists()


def test_an_interpreter_without_vllm_or_plug_in_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"has no vLLM; .*--vllm-python"):
        check_python(str(tmp_path / "nothing"))
    (tmp_path / "vllm.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("collm.vllm.launch.GROUP", "collm.tests")
    with pytest.raises(ConfigError, match=r"no collm plug-in; install collm-vllm"):
        check_python(sys.executable)
    (tmp_path / "plugin-1.dist-info").mkdir()
    (tmp_path / "plugin-1.dist-info" / "METADATA").write_text("Name: plugin\nVersion: 1\n")
    (tmp_path / "plugin-1.dist-info" / "entry_points.txt").write_text(
        "[collm.tests]\ncollm = collm.vllm.plugin:register"
    )
    assert check_python(sys.executable) == sys.executable
