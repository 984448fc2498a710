"""Commands across servers do what they do with models in memory, and say what does not go there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from collm import CoLLM, ModelSpec
from collm.cli.main import app
from collm.core.policies import ThresholdPolicy
from collm.errors import ArtefactError, ConfigError
from collm.evaluation.gold import gold_examples, gold_views
from collm.evaluation.systems import systems_named
from collm.models.loading import load_model
from collm.serving.settings import Settings
from collm.training.data import Row
from collm.training.examples import Example, Examples
from collm.vllm.export import check_exported
from collm.vllm.servers import Servers
from tests.engine.test_engine import random_head
from tests.serving.conftest import Running
from tests.vllm.conftest import Cluster, Members

NOBODY = "http://127.0.0.1:9/v1"


@dataclass
class Saved:
    """A collaboration on disk, and the addresses of its fake servers."""

    path: str
    servers: str


@pytest.fixture
def saved(members: Callable[[int], Members], cluster: Callable[..., Cluster], tmp_path: Path) -> Saved:
    m, names = members(1), ("base", "assistant")
    for name, module in zip(names, m.models, strict=True):
        module.save_pretrained(tmp_path / name)
        m.tokenizer.save_pretrained(tmp_path / name)
    base, assistant = (ModelSpec(str(tmp_path / name)) for name in names)
    CoLLM(base, [assistant], m.head, m.tokenizer).save_pretrained(tmp_path / "pair")
    return Saved(str(tmp_path / "pair"), ",".join(fake.url for fake in cluster(1).fakes))


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.stdout


def rows(path: Path) -> Path:
    asked = [f"w{3 * n} w{3 * n + 1}" for n in range(1, 7)]
    path.write_text("".join(json.dumps({"prompt": one, "completion": "w7 w8"}) + "\n" for one in asked))
    return path


def test_generate_writes_the_same(saved: Saved) -> None:
    asked = ["generate", saved.path, "w5 w6", "--threshold", 0.5, "--max-tokens", 12]
    assert run(*asked, "--servers", saved.servers) == run(*asked)


def test_calibrate_finds_the_same(saved: Saved, tmp_path: Path) -> None:
    asked = ["calibrate", saved.path, "--data", rows(tmp_path / "rows.jsonl"), "--metric", "token_f1"]
    asked += ["--rate", 0.3, "--max-tokens", 8, "--refine", 0]
    found = []
    for more in ((), ("--servers", saved.servers)):
        run(*asked, *more)
        calibration = CoLLM.from_pretrained(saved.path).calibration
        assert calibration is not None
        found.append({round(point.threshold, 5): point for point in calibration.points})
    local, served = found
    assert local.keys() >= served.keys()  # with models in memory, the best of the teacher-forced curve too
    for threshold, point in served.items():
        assert (point.deferral_rate, point.metric) == (local[threshold].deferral_rate, local[threshold].metric)


@pytest.fixture
def tuned(saved: Saved, tmp_path: Path) -> Saved:
    """The same with a LoRA adapter on the base, and without the weights of the models."""
    pair = CoLLM.from_pretrained(saved.path)
    base: Any = load_model(ModelSpec(str(tmp_path / "base")))
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    CoLLM(adapted, pair.assistants, pair.head, pair.tokenizer).save_pretrained(tmp_path / "tuned")
    for name in ("base", "assistant"):
        (tmp_path / name / "model.safetensors").unlink()
    return Saved(str(tmp_path / "tuned"), saved.servers)


def test_commands_across_servers_load_no_model(tuned: Saved, tmp_path: Path) -> None:
    """Who uses servers because the models do not fit has no other."""
    asked = ["--data", rows(tmp_path / "rows.jsonl"), "--metric", "token_f1", "--max-tokens", 4]
    asked += ["--servers", tuned.servers]
    run("calibrate", tuned.path, *asked, "--budget", 0.2, "--check", 0.4)
    run("eval", tuned.path, *asked, "--task", "rows", "--out", tmp_path / "out")
    run("generate", tuned.path, "w5 w6", "--max-tokens", 4, "--servers", tuned.servers)


def test_what_needs_models_in_memory_is_refused_across_servers(tuned: Saved, tmp_path: Path) -> None:
    asked = ["calibrate", tuned.path, "--teacher-forced", "--servers", f"{NOBODY},{NOBODY}"]
    for more in ([], ["--data", str(rows(tmp_path / "rows.jsonl"))]):
        done = CliRunner().invoke(app, [*asked, *more])
        assert done.exit_code == 2
        assert "leave --servers out" in " ".join(done.stderr.split())
    model = CoLLM.from_pretrained(tuned.path, servers=Servers([NOBODY, NOBODY]))
    row = Row("w5", "w6", None, "line 1")
    uses: list[Callable[[], object]] = [
        lambda: model.members,
        lambda: gold_examples(model, [row], max_length=9),
        lambda: gold_views(model, Examples([Example([5, 6], [False, True])]), []),
        lambda: model.export_vllm(tmp_path / "exported"),
        lambda: systems_named(model, ["proxy=" + str(tmp_path / "base")], ThresholdPolicy(0.5))[1].load(),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match="in memory"):
            use()
    assert not (tmp_path / "exported").exists()


def test_eval_scores_the_same(saved: Saved, tmp_path: Path) -> None:
    asked = ["eval", saved.path, "--task", "rows", "--data", rows(tmp_path / "rows.jsonl"), "--metric", "token_f1"]
    asked += ["--threshold", 0.5, "--max-tokens", 8, "--compare", "base,assistant,random,budget:budget=0.2"]
    found: list[dict[str, Any]] = []
    for name, more in {"local": (), "served": ("--servers", saved.servers)}.items():
        run(*asked, "--out", tmp_path / name, *more)
        found.append(json.loads((tmp_path / name / "results.json").read_text()))
    for local, served in zip(*(one["rows"] for one in found), strict=True):
        for key in ("name", "measures", "difference", "deferral_rate"):
            assert served[key] == local[key]
        assert served["flops"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate", "PAIR", "hi", "--servers", f"{NOBODY},{NOBODY}", "--device", "cpu"], "device"),
        (["generate", "PAIR", "hi", "--servers", f"{NOBODY},{NOBODY}", "--dtype", "float32"], "dtype"),
        (["generate", "PAIR", "hi", "--servers", f"{NOBODY},{NOBODY}", "--engine", "local"], "engine"),
        (["generate", "PAIR", "hi", "--engine", "vllm"], "servers"),
        (["generate", "PAIR", "hi", "--servers", ",".join([NOBODY] * 3)], "got 3 servers for a base and 1 assistants"),
        (["serve", "PAIR", "other=PAIR", "--engine", "vllm"], "one engine holds one collaboration"),
        (["launch", "PAIR", "--base-flags", "--seed 1"], "--base-flags has no effect on one engine"),
        (["launch", "PAIR", "--on-failure", "base"], "--on-failure has no effect on one engine"),
        (["serve", "PAIR", "other=PAIR", "--servers", NOBODY], "--servers was given 1 times for 2 collaborations"),
        (["launch", "PAIR", "--servers", NOBODY], "--servers has no effect here"),
        (["launch", "PAIR", "--eager"], "--eager has no effect here"),
        (["launch", "PAIR", "other=PAIR"], "serves one collaboration, got PAIR other=PAIR"),
        (["launch", "PAIR", "--host", "0.0.0.0"], "there is no API key"),
        (["launch", "PAIR", "--max-batch", "0"], "max_batch is 0"),
    ],
)
def test_what_has_no_effect_is_refused(saved: Saved, arguments: list[str], complaint: str) -> None:
    done = CliRunner().invoke(app, [one.replace("PAIR", saved.path) for one in arguments])
    assert isinstance(done.exception, ConfigError), done.output
    assert complaint in str(done.exception).replace(saved.path, "PAIR")


def test_launch_refuses_an_option_that_neither_command_has(saved: Saved) -> None:
    done = CliRunner().invoke(app, ["launch", saved.path, "--max-bathc", "3"])
    assert done.exit_code == 2
    assert "--max-bathc" in done.stderr


def test_servers_are_written_as_they_are_read(tmp_path: Path) -> None:
    servers = Servers([NOBODY], on_failure="base", timeout_s=3.5, retries=0, wait_s=9.0, api_key_env="KEY")
    servers.write(tmp_path / "servers.yaml")
    assert Servers.named(str(tmp_path / "servers.yaml")) == servers
    assert Servers.named(f"{NOBODY}, http://localhost:8002/v1/").urls == (NOBODY, "http://localhost:8002/v1")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[http://localhost:8001/v1]", "expected 'urls'"),
        ("urls: [http://localhost:8001/v1]\ntimeout: 3", "and any of api_key_env, on_failure"),
        ("urls: [http://localhost:8001/v1]\napi_key: sk-secret", "servers.yaml has urls, api_key, expected 'urls' and"),
        ("urls: [http://localhost:8001/v1]\napi_key_env: sk-secret", "is not the name of an environment variable"),
        ("urls: [http://localhost:8001/v1]\napi_key_env: [secret]", "is not the name of an environment variable"),
        ("sk-secret", "servers.yaml has str, expected 'urls'"),
        ("urls: http://secret@localhost:8001/v1", "urls is not a list of addresses"),
        ("urls: {http://secret@localhost:8001/v1: 1}", "urls is not a list of addresses"),
        ("urls: [secret, 3]", "urls is not a list of addresses"),
        ("urls: [&a http://localhost:8001/v1, *a]", "expected addresses like"),
        ("urls: http://localhost:8001/v1", "urls is not a list of addresses"),
        ("urls: [http://localhost:8001/v1]\ntimeout_s: soon", "expected a list of urls, seconds and numbers"),
        ("urls: [http://user:secret@localhost/v1]", "is not a URL"),
        ("urls: [unclosed", "expected addresses like"),
        (None, "FileNotFoundError; expected addresses like"),
    ],
)
def test_a_file_of_servers_that_is_none_is_refused(tmp_path: Path, content: str | None, complaint: str) -> None:
    path = tmp_path / "servers.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as refusal:
        Servers.named(str(path))
    assert complaint in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_an_export_of_another_head_is_refused(members: Callable[[int], Members]) -> None:
    m = members(1)
    check_exported(m.exported, m.head)
    with pytest.raises(ArtefactError, match="was exported with another head; remove the directory"):
        check_exported(m.exported, random_head(32, 1, scale=2.0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {"5": 1}),
        ("allowed_token_ids", [5, 6]),
        ("response_format", {"type": "json_object"}),
        ("structured_outputs", {"regex": "w5"}),
    ],
)
def test_a_server_across_servers_names_the_field_that_it_cannot_follow(
    field: str, value: Any, cluster: Callable[..., Cluster]
) -> None:
    running = Running({"pair": cluster(1).connect()}, Settings()).start()
    try:
        asked = {"prompt": "w5 w6", "collm": {"threshold": 0.5}, field: value}
        reply = running.post("/v1/completions", model="pair", **asked)
    finally:
        running.stop()
    error = {"message": f"{field} is not available across servers; leave it out, or use engine 'local'"}
    error |= {"type": "invalid_request_error", "param": field, "code": None}
    assert (reply.status_code, reply.json()) == (400, {"error": error})
