"""`collm serve` as a user starts it, and what docs/serving.md says to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from collm import CoLLM, SamplingParams
from collm.cli.main import app
from collm.cli.serve import named
from collm.errors import ConfigError, MissingExtra
from collm.models.loading import ModelSpec
from collm.serving.settings import Settings
from collm.text.template import PromptTemplate
from tests.engine.test_engine import random_head
from tests.serving.conftest import CALIBRATION, CHAT

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
COMMAND = [sys.executable, "-c", "from collm.cli.main import main; main()", "serve"]


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


@pytest.fixture(params=[CHAT], ids=["chat"])
def artefact(
    saved_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, request: Any
) -> Path:
    members = [ModelSpec(str(saved_model(name, seed))) for seed, name in enumerate(("base", "assistant"))]
    head = random_head(32, 1, scale=1.0)
    template = PromptTemplate(chat=request.param)
    model = CoLLM(members[0], members[1:], head, tokenizer, template=template, calibration=CALIBRATION)
    model.save_pretrained(tmp_path / "my-run/collaboration")
    return tmp_path / "my-run/collaboration"


@pytest.fixture
def started(artefact: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The page's command, and the port it listens on."""
    line = next(line for block in blocks("") for line in block.splitlines() if line.startswith("collm serve"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*COMMAND, *line.split()[2:], "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=artefact.parents[1], stderr=subprocess.PIPE, text=True, env=environment)
    ticking = threading.Event()
    for _ in range(600):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                break
        except httpx.TransportError:
            assert process.poll() is None, process.communicate()[1]
        ticking.wait(0.1)
    try:
        yield process, port
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("given", "name", "path"),
    [
        ("runs/c", "c", "runs/c"),
        ("a=runs/c", "a", "runs/c"),
        ("runs/lr=0.1/c", "c", "runs/lr=0.1/c"),
        ("a=runs/lr=0.1/c", "a", "runs/lr=0.1/c"),
        ("./lr=0.1", "lr=0.1", "./lr=0.1"),
        ("~/lr=0.1", "lr=0.1", "~/lr=0.1"),
        ("lr=0.1", "lr=0.1", "lr=0.1"),
        ("lr=0.2", "lr", "0.2"),
        ("a=lr=0.1", "a", "lr=0.1"),
        ("a=me/collaboration", "a", "me/collaboration"),
        ("me/collaboration", "collaboration", "me/collaboration"),
        ("=c", "=c", "=c"),
        ("a/b=lr=0.1", "a/b", "lr=0.1"),  # a name that is refused
    ],
)
def test_a_path_may_have_an_equals_sign(
    given: str, name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1").mkdir()
    assert named(given) == (name, path)


def test_a_run_gives_its_collaboration_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-run/collaboration").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert named("my-run/collaboration") == ("my-run", "my-run/collaboration")
    assert named("own=my-run/collaboration") == ("own", "my-run/collaboration")
    monkeypatch.chdir("my-run/collaboration")
    assert named(".") == ("my-run", ".")


class Served:
    """The call of the server by `collm serve`, which is not started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("COLLM_API_KEY", raising=False)
        monkeypatch.setattr(import_module("collm.serving.run"), "run", self._run)

    def _run(self, models: Any, settings: Settings, **address: Any) -> None:
        self.models, self.settings, self.address = models, settings, address

    def __call__(self, *arguments: object) -> None:
        done = CliRunner().invoke(app, ["serve", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output


def test_options_come_from_a_file_and_flags_override_it(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, file = Served(monkeypatch), tmp_path / "serve.yaml"
    file.write_text(
        f"collaborations: one={artefact}\nhost: 0.0.0.0\nport: 8080\napi_key: 0123\nmax_batch: 4\n"
        "time-limit: 9.5\nignore_unknown: true\nallow_origin: [https://a.org, https://b.org]\n"
    )
    served("--config", file)
    assert list(served.models) == ["one"]
    assert served.address == {"host": "0.0.0.0", "port": 8080, "no_auth": False}
    expected = Settings(
        api_key="0123",
        max_batch=4,
        time_limit_s=9.5,
        ignore_unknown=True,
        allow_origins=["https://a.org", "https://b.org"],
    )
    assert served.settings == expected
    served(artefact, "--config", file, "--port", "8081", "--max-batch", "5", "--allow-origin", "https://c.org")
    assert list(served.models) == ["my-run"]
    assert served.address["port"] == 8081
    assert served.settings == replace(expected, max_batch=5, allow_origins=["https://c.org"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_bach: 3", "has the field 'max_bach', which is no option; did you mean max_batch?"),
        ("config: other.yaml", "has the field 'config', which is no option"),
        ("host: [a, b]", r"host in .* is \['a', 'b'\], expected one value"),
        ("allow_host: [[a]]", r"allow_host in .* is \[\['a'\]\], expected texts"),
        ("- host", "contains list, expected fields with values"),
        ("host: {", r"(?s)could not read .*expected a YAML file of fields"),
    ],
)
def test_a_wrong_file_of_options_is_one_sentence(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["serve", "--config", str(tmp_path / "serve.yaml")], catch_exceptions=False)


def test_a_wrong_value_in_a_file_is_said_as_of_a_flag(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("collaborations: c\nport: 1.5\n")
    done = CliRunner().invoke(app, ["serve", "--config", str(tmp_path / "serve.yaml")], env={"TERM": "dumb"})
    assert done.exit_code == 2
    assert "--port" in done.output


@pytest.mark.soak
@pytest.mark.parametrize("artefact", [CHAT, None], indirect=True, ids=["chat", "plain"])
def test_what_the_page_says_runs(
    started: tuple[subprocess.Popen[str], int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    process, port = started
    commands = "".join(block for block in blocks("") if block.startswith("curl"))
    assert commands.count("curl ") == 2
    script = "set -e\n" + commands.replace("curl", "curl -sS --fail").replace("8000", str(port))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, *_ = done.stdout.split("data: ")
    assert json.loads(whole)["usage"]["completion_tokens"] == 8
    assert done.stdout.rstrip().endswith("data: [DONE]")

    text, chat, _ = (snippet.replace("8000", str(port)) for snippet in blocks("python"))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "deferral_rate" in done.stdout
    done = subprocess.run([sys.executable, "-c", chat], capture_output=True, text=True, cwd=tmp_path)
    if "plain" in request.node.name:
        assert "Error code: 400" in done.stderr
        assert "chat template" in done.stderr
    else:
        assert done.returncode == 0, done.stderr

    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert sum("route" in line for line in lines) == 6


@pytest.mark.soak
def test_the_process_ends_whatever_runs_in_it(started: tuple[subprocess.Popen[str], int]) -> None:
    process, port = started
    body = {"model": "my-run", "prompt": "w5 " * 1_390_000, "truncate_prompt_tokens": 4}

    def ask() -> None:
        with suppress(httpx.TransportError):
            httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    threading.Event().wait(1.5)
    for _ in range(2):  # the second one does not wait for requests
        process.send_signal(signal.SIGTERM)
        threading.Event().wait(0.5)
    start = time.monotonic()
    process.wait(60)
    assert time.monotonic() - start < 20  # generous: about 6 s, of which a step may take 5
    for thread in threads:
        thread.join()


def test_the_errors_of_the_page_are_those_of_the_server(server: Any) -> None:
    (example,) = (json.loads(block) for block in blocks("json"))
    came = server.post("/v1/completions", model="pair", prompt="w1", temperature=3).json()
    assert set(came["error"]) == set(example["error"])
    assert came["error"]["message"].startswith("temperature is 3: ")


def test_the_page_lists_every_route_and_metric(server: Any) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert set(paths) <= set(re.findall(r"/[\w/{}]+", PAGE))
    names = set(re.findall(r"^# TYPE (collm_\w+?)(?:_total)? (?:counter|histogram)|^# TYPE (collm_\w+) gauge",
                           server.client.get("/metrics").text, flags=re.MULTILINE))  # fmt: skip
    for name in {one or other for one, other in names} - {""}:
        assert name.removesuffix("_created") in PAGE


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--max-batch", "0"], "max_batch is 0"),
        (["--max-connections", "-1"], "max_connections is -1"),
        (["--keep-alive", "-1"], "keep_alive_s is -1"),
        (["--time-limit", "0"], "time_limit_s is 0.0"),
        (["--api-key", "schlüssel"], "use printable ASCII"),
        (["--price", "0.7"], "this head predicts no gains"),
        (["{artefact}"], "two collaborations are called 'my-run'"),
        (["a/b={artefact}"], "named 'a/b'"),
    ],
)
def test_wrong_options_are_errors(
    artefact: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLLM_API_KEY", raising=False)
    filled = [argument.replace("{artefact}", str(artefact)) for argument in arguments]
    with pytest.raises(ConfigError, match=re.escape(message)):
        CliRunner().invoke(app, ["serve", str(artefact), *filled], catch_exceptions=False)


def test_a_missing_extra_is_said_with_the_command_that_helps(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("collm.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingExtra, match=r"pip install 'collm\[serve\]'"):
        CliRunner().invoke(app, ["serve", str(artefact)], catch_exceptions=False)


def test_recipes_start_the_command_with_options_it_has() -> None:
    recipes = Path(__file__).parents[2] / "recipes" / "serving"
    text = (recipes / "Dockerfile").read_text() + (recipes / "collm.service").read_text()
    known = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    used = set(re.findall(r"--(?:host|port|drain|api-key)\b", text))
    assert used == {"--host", "--port", "--drain"}
    assert all(option in known for option in used)
    copied = " ".join(re.findall(r"^COPY (.+) \S+$", text, flags=re.MULTILINE)).split()
    assert copied
    assert all((recipes.parents[1] / name).exists() for name in copied)


def test_the_file_of_the_page_has_options(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks("yaml")
    monkeypatch.chdir(artefact.parents[1])
    Path("serve.yaml").write_text(block)
    served = Served(monkeypatch)
    served("--config", "serve.yaml")
    assert list(served.models) == ["my-run"]
    assert served.settings == Settings(max_batch=8)


def test_nginx_of_the_page_has_the_limits_of_the_server() -> None:
    (block,) = blocks("nginx")
    assert "proxy_buffering off;" in block
    assert f"proxy_read_timeout {Settings().time_limit_s:g}s;" in block
    assert f"client_max_body_size {Settings().max_body_bytes >> 20}m;" in block
    known = CliRunner().invoke(app, ["serve", "--help-all"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    assert all(option in known for option in re.findall(r"--[\w-]+", block))


def test_the_page_moves_a_collaboration(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = re.findall(r"^collm (pack .*)$", PAGE, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    params = SamplingParams(max_tokens=8)
    expected = CoLLM.from_pretrained(artefact).generate("w5 w6", params)[0].token_ids
    done = CliRunner().invoke(app, line.split(), catch_exceptions=False)
    assert done.exit_code == 0
    for gone in ("my-run", "base", "assistant"):
        shutil.rmtree(gone)
    uploaded: list[Path] = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: "https://hub/me/my-pair")
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder",
        lambda *_, folder_path, **__: uploaded.append(shutil.copytree(folder_path, tmp_path / "uploaded")),
    )
    CoLLM.from_pretrained("my-pair").push_to_hub("me/my-pair")
    shutil.rmtree("my-pair")
    assert CoLLM.from_pretrained(uploaded[0]).generate("w5 w6", params)[0].token_ids == expected
