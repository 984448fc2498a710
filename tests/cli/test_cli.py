"""The whole path through the command line, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from collm import CoLLM, DeferralHead
from collm.cli.main import app, main
from collm.cli.train import parse
from collm.errors import ConfigError
from collm.models.loading import ModelSpec, load_tokenizer
from tests.fake_server import FakeServer
from tests.processes import collm

ROOT = Path(__file__).parents[2]
REQUIRED = "base: b\nassistant: x\ndata: d\noutput_dir: o\n"
WIDE = {"COLUMNS": "200", "TERM": "dumb"}


def write_rows(path: Path, count: int) -> Path:
    texts = [(f"w{i % 20} w{i % 7}", f"w{(i * 3) % 30} w{i % 11} w{i % 5}") for i in range(count)]
    path.write_text("".join(json.dumps({"prompt": one, "completion": other}) + "\n" for one, other in texts))
    return path


@pytest.fixture
def pair(saved_model: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    return {
        "base": saved_model("base", 0),
        "assistant": saved_model("assistant", 1, hidden_size=48),
        "data": write_rows(tmp_path / "train.jsonl", 40),
        "validation": write_rows(tmp_path / "validation.jsonl", 5),
    }


@pytest.mark.slow
def test_score_train_calibrate_generate(pair: dict[str, Path], tmp_path: Path) -> None:
    scores = tmp_path / "run" / "scores" / "assistant"
    scored = succeeds(
        "score", pair["data"], "--model", pair["assistant"], "--tokenizer", pair["base"], "--out", scores,
        "--max-length", 64, cwd=tmp_path,
    )  # fmt: skip
    assert "160 target tokens: mean NLL" in scored.stdout
    shards = {path.name: path.read_bytes() for path in scores.iterdir()}

    options = {"max_length": 64, "max_tokens": 4, "num_train_epochs": 1, "output_dir": "elsewhere"}
    config = {**{name: str(path) for name, path in pair.items()}, **options, "method": "head", "use_cpu": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    trained = succeeds("train", "--config", "run.yaml", "--output_dir", "run", cwd=tmp_path)
    assert "training into run;" in trained.stdout
    kept = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (kept["output_dir"], kept["method"]) == ("run", "head")
    assert "target tokens to an assistant" in trained.stderr
    assert {path.name: path.read_bytes() for path in scores.iterdir()} == shards  # found, not computed again
    artefact = tmp_path / "run" / "collaboration"
    assert "versions" in json.loads((tmp_path / "run" / "run.json").read_text())
    assert json.loads((artefact / "calibration.json").read_text())["num_prompts"] == 5

    metric = ("--metric", "token_f1", "--max-tokens", 3)
    succeeds("calibrate", artefact, "--data", pair["validation"], *metric, cwd=tmp_path)
    assert json.loads((artefact / "calibration.json").read_text())["metric_name"] == "token_f1"

    _calibrate_as_the_run_says(artefact, pair, tmp_path)

    asked = ("generate", artefact, "w1 w2", "--max-tokens", 5)
    fixed = (*asked, "--threshold", 0.5, "--lookahead", 0)
    plain, machine = (collm(*fixed, *extra, cwd=tmp_path) for extra in ([], ["--json"]))
    assert plain.returncode == machine.returncode == 0, plain.stderr + machine.stderr
    completion = json.loads(machine.stdout)
    assert plain.stdout == completion["text"] + "\n"  # piped: no colours, nothing else
    expected = CoLLM.from_pretrained(artefact).generate("w1 w2", threshold=0.5)[0].token_ids[:5]
    assert completion["token_ids"] == expected
    assert completion["usage_of_call"]["base"]["forward_passes"] == len(expected)

    fails(2, "price is 0.7, but this head predicts no gains", *asked, "--price", 0.7, cwd=tmp_path)
    ruled = (*asked, "--policy")
    mixed = succeeds(*ruled, "mixture", "--json", cwd=tmp_path)
    together = CoLLM.from_pretrained(artefact).generate("w1 w2", policy="mixture")[0].token_ids[:5]
    assert json.loads(mixed.stdout)["token_ids"] == together
    fails(2, "policy is 'best', expected one of threshold, .* proxy", *ruled, "best", cwd=tmp_path)


@pytest.mark.slow
def test_a_head_of_objective_gain_decodes_at_a_price(pair: dict[str, Path], tmp_path: Path) -> None:
    models = [f"--{name}={pair[name]}" for name in ("base", "assistant", "data")]
    how = ("--method", "head", "--max-length", 64, "--calibrate", "false", "--use-cpu", "true", "--output-dir", "run")
    succeeds("train", *models, *how, "--objective", "gain", cwd=tmp_path)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["objective"], metrics["gain_num_tokens"]) == ("gain", 144)  # a tenth of the rows is held out
    assert metrics["gain_error_nats"] > 0
    artefact = tmp_path / "run" / "collaboration"
    assert "- gain_spread_nats: " in (artefact / "README.md").read_text()
    asked = ("generate", artefact, "w1 w2", "--max-tokens", 5, "--json", "--price")
    rates = [json.loads(succeeds(*asked, price, cwd=tmp_path).stdout)["deferral_rate"] for price in (-99, 99)]
    assert rates == [1.0, 0.0]


def _calibrate_as_the_run_says(artefact: Path, pair: dict[str, Path], tmp_path: Path) -> None:
    calibrate, path = ("calibrate", artefact), artefact / "calibration.json"
    before = path.read_bytes()
    curve = succeeds(*calibrate, "--teacher-forced", "--budget", 0.3, cwd=tmp_path)
    assert "20 gold tokens, " in curve.stdout
    assert "of all" in curve.stdout
    assert "within 0.3" in curve.stdout
    kept = tmp_path / "run" / "scores" / "validation" / "assistant"
    assert json.loads((kept / "scores.json").read_text())["num_targets"] == 20
    here = collm(*calibrate, "--teacher-forced", "--data", pair["validation"], "--budget", 0.3, cwd=tmp_path)
    assert here.stdout == curve.stdout
    assert path.read_bytes() == before

    held = succeeds(*calibrate, "--check", 0.4, "--budget", 0.3, "--refine", 1, cwd=tmp_path)
    assert "On 2 held-out prompts, the default threshold" in held.stdout
    found = json.loads(path.read_text())
    assert (found["num_prompts"], found["budgets"], len(found["checks"])) == (3, [0.3], 2)
    assert "On 2 held-out prompts" in (artefact / "README.md").read_text()
    other = succeeds(*calibrate, "--check-data", pair["data"], "--refine", 0, cwd=tmp_path)
    assert "On 40 held-out prompts" in other.stdout

    fails(2, "0 of 5 rows; expected a number between 0 and 1", *calibrate, "--check", 0.01, cwd=tmp_path)


def succeeds(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = collm(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def fails(status: int, message: str, *arguments: object, cwd: Path) -> None:
    done = collm(*arguments, cwd=cwd)
    assert done.returncode == status, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_in_parts(pair: dict[str, Path], tmp_path: Path) -> None:
    """Scoring what the run will read, training without calibration, calibrating on the rows it held out."""
    (tmp_path / "chat.jinja").write_text("{% for message in messages %}{{ message.content + ' ' }}{% endfor %}")
    options = {
        "base": str(pair["base"]), "assistant": str(pair["assistant"]), "data": str(pair["data"]), "max_length": 64,
        "output_dir": "run", "method": "head", "max_tokens": 4, "calibrate": False, "use_cpu": True,
        "chat_template": str(tmp_path / "chat.jinja"), "metric": "token_f1", "rates": [0.0, 0.5],
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    for author in ("base", "assistant"):
        scored = succeeds("score", "--config", "run.yaml", "--author", author, cwd=tmp_path)
        assert "144 target tokens" in scored.stdout  # 4 of 40 rows are held out
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    trained = succeeds("train", "--config", "run.yaml", cwd=tmp_path)
    assert "not calibrated: collm calibrate run/collaboration" in trained.stdout
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not (tmp_path / "run/collaboration/calibration.json").exists()
    succeeds("calibrate", "run/collaboration", cwd=tmp_path)
    loaded = CoLLM.from_pretrained(tmp_path / "run/collaboration")
    assert loaded.template.chat == (tmp_path / "chat.jinja").read_text()
    assert loaded.calibration is not None
    assert (loaded.calibration.num_prompts, loaded.calibration.metric_name) == (4, "token_f1")


@pytest.mark.slow
def test_another_metric_needs_neither_the_data_nor_the_directory_of_the_run(
    pair: dict[str, Path], tmp_path: Path
) -> None:
    names = {name: os.path.relpath(pair[name], tmp_path) for name in ("base", "assistant", "data")}
    flags = [part for name, path in names.items() for part in (f"--{name}", path)]
    trained = succeeds(
        "train", *flags, "--output_dir", "run", "--scores", "scores", "--method", "head", "--max_tokens", 3,
        "--use_cpu", "true", "--eval_strategy", "epoch", "--rates", 0, 0.5, cwd=tmp_path,
    )  # fmt: skip
    assert "the metric is token_f1, because most completions have several words" in trained.stderr
    for line in ("scoring with .*/base: 0 of 180 tokens", "training: 10 of 10 steps", "step 10: .*train_loss"):
        assert re.search(rf"^{line}", trained.stderr, flags=re.MULTILINE), trained.stderr
    pair["data"].unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    asked = ("calibrate", tmp_path / "run/collaboration")
    again = succeeds(*asked, "--metric", "contains", "--rate", 1, "--limit", 3, cwd=elsewhere)
    assert "calibrating on 3 rows: 0 of 21 texts at most\n" in again.stderr
    found = json.loads((tmp_path / "run/collaboration/calibration.json").read_text())
    assert (found["metric_name"], found["num_prompts"]) == ("contains", 3)
    before = sorted((tmp_path / "scores").rglob("*"))
    assert "16 gold tokens" in succeeds(*asked, "--teacher-forced", cwd=elsewhere).stdout
    assert sorted((tmp_path / "run").rglob("scores*")) == []
    assert sorted((tmp_path / "scores").rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["score", "--config", "run.yaml"], "needs --author"),
        (["score", "x.jsonl", "--config", "run.yaml", "--author", "base"], "leave data out"),
        (["score", "x.jsonl"], "expected DATA, --model and --out; or --config run.yaml"),
        (["score", "x.jsonl", "--concurrency", "3"], "without --server"),
        (["calibrate", "run", "--prompt-field", "question"], "without --data the rows are those that the run of DIR"),
        (["calibrate", "run", "--teacher-forced", "--rate", "0.4"], "generates nothing; leave --rate out"),
        (["calibrate", "run", "--check", "0.4", "--check-data", "x.jsonl"], "are both given"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert complaint in " ".join(re.sub("[\u2500-\u257f]", " ", result.stderr).split())


@pytest.mark.slow
def test_evaluating_and_reporting(pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    specs = [ModelSpec(str(pair[name])) for name in ("base", "assistant")]
    tokenizer = load_tokenizer(specs[0])
    CoLLM(specs[0], specs[1:], DeferralHead(32, 1), tokenizer).save_pretrained("mine")
    asked = ["eval", "mine", "--task", "rows", "--data", str(pair["validation"])]
    asked += ["--out", "run", "--max-tokens", "5"]
    monkeypatch.setattr("sys.argv", ["/bin/collm", "eval", "mine"])
    done = CliRunner().invoke(app, [*asked, "--threshold", "0.4", "--compare", "base,assistant,random"])
    assert done.exit_code == 0, done.output
    assert "The collaboration reaches token_f1" in " ".join(done.stdout.split())
    assert "answering: 20 of 20 answers\n" in done.stderr  # of 4 systems
    shown = json.loads((tmp_path / "run/results.json").read_text())
    assert [row["name"] for row in shown["rows"]] == ["collaboration", "base", "assistant", "random"]
    assert shown["threshold"] == 0.4
    assert shown["settings"]["data"] == str(pair["validation"])
    assert shown["settings"]["command"] == "collm eval mine"
    reported = CliRunner().invoke(app, ["report", "run"])
    assert reported.exit_code == 0, reported.output
    assert "What each model did for an item" in (tmp_path / "run/report.html").read_text()
    for arguments, complaint in (
        ([*asked, "--threshold", "0.4", "--curve"], "is not calibrated, so there is no curve"),
        ([*asked], "there is no default threshold"),
        ([*asked, "--price", "0.4"], "this head predicts no gains"),
        ([*asked[:3], "gsm8k", *asked[4:]], "task 'gsm8k' has no option 'max_tokens', expected format"),
        (["report", "elsewhere"], "contains no finished evaluation"),
    ):
        failed = CliRunner().invoke(app, arguments)
        assert complaint in str(failed.exception)


@pytest.mark.slow
def test_failures_are_one_sentence(pair: dict[str, Path], tmp_path: Path) -> None:
    fails(1, "^collm: there is no collaboration at nowhere", "generate", "nowhere", "hi", cwd=tmp_path)
    absurd = ("--top-p", 0.5, "--temperature", 0)
    fails(2, "top_p=0.5 .* no effect at temperature 0", "generate", "nowhere", "hi", *absurd, cwd=tmp_path)
    debugged = collm("generate", "nowhere", "hi", "--debug", cwd=tmp_path)
    assert debugged.returncode == 1
    assert "Traceback" in debugged.stderr


@pytest.mark.soak
def test_ctrl_c_while_scoring_leaves_a_run_that_resumes(pair: dict[str, Path], tmp_path: Path) -> None:
    data, out = write_rows(tmp_path / "many.jsonl", 4_000), tmp_path / "scores"
    options = ["score", data, "--model", pair["base"], "--out", out]
    command = [sys.executable, "-c", "from collm.cli.main import main; main()", *map(str, options)]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.safetensors"))) < 2 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "collm: interrupted; run the same command again" in errors
    first = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 2 <= len(first) < 4_000 / 256
    assert collm(*options, cwd=tmp_path).returncode == 0
    assert {name: (out / name).stat().st_mtime_ns for name in first} == first  # kept, not computed again
    assert len(list(out.glob("*.safetensors"))) == 16


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("demo --ot x", "there is no option --ot; did you mean --out?"),
        (
            "serve X --engine foo",
            "invalid value for '--engine': 'foo' is not one of 'local', 'transformers', 'vllm'; '",
        ),
        (
            "serve X --port 70000",
            "invalid value for '--port': Input should be less than or equal to 65535, got '70000';",
        ),
        ("generate", "missing argument 'DIR'; '"),
        ("calibrat X", "no such command 'calibrat'. Did you mean 'calibrate'?"),
        ("score x.jsonl", "expected DATA, --model and --out; or --config run.yaml; '"),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: str, complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["collm", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith(f"collm: {complaint}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", ["generate", "generate x y --nothing", "nothing", "demo --out x --seed one"])
def test_wrong_usage_has_status_2(arguments: str) -> None:
    assert CliRunner().invoke(app, arguments.split()).exit_code == 2


def test_yaml_and_flags_are_the_same_fields_and_a_flag_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base: b\nassistant: [x, y]\ndata: d\noutput_dir: o\nlearning_rate: 2e-4\nmethod: full\n")
    run, args = parse(["--config", str(path), "--seed", "7", "--stop", "A", "B"])
    assert (run.base, run.assistant, run.stop) == ("b", ["x", "y"], ["A", "B"])
    assert (args.learning_rate, args.seed) == (2e-4, 7)
    run, args = parse(["--config", str(path), "--assistant", "z", "--learning_rate", "1e-3", "--use_cpu", "true"])
    assert (run.assistant, args.learning_rate, args.use_cpu) == (["z"], 1e-3, True)
    run, _ = parse(["--config", str(path), "--template", "Question: {prompt}\nAnswer:", "--validation", "null"])
    assert (run.template, run.validation) == ("Question: {prompt}\nAnswer:", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{REQUIRED}learnig_rate: 1\n", "did you mean 'learning_rate'"),
        ("base: b\n", "missing: assistant, data, output_dir"),
        ("- a\n", "expected fields with values"),
        ("base: [", "could not read"),
        (f"{REQUIRED}metric: best\n", "best"),
        (f"{REQUIRED}rates: [0, 1.2]\n", r"cannot aim at a deferral rate of 1\.2"),
        (f"{REQUIRED}lora_r: 4\n", "lora_r has no effect"),
        (f"{REQUIRED}template: {{prompt}}\n", "put it in quotes"),
        (REQUIRED.replace("x", "[]"), "no assistant"),
        (f"{REQUIRED}validation_split: t\n", "no effect without validation"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--asistant x", "there is no option --asistant; did you mean --assistant?"),
        ("--max-new-tokns=3", "there is no option --max-new-tokns; did you mean --max-tokens?"),
        ("run.yaml", "'run.yaml' belongs to no option; a YAML file is given with --config"),
        ("--completely-unlike", "there is no option --completely-unlike; 'collm train --help-all' lists the options"),
        ("--base", "argument --base: expected one argument; 'collm train --help' lists the options"),
    ],
)
def test_a_mistyped_flag_of_train_is_one_sentence(arguments: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(complaint)}$"):
        parse(arguments.split())


def test_hyphens_and_underscores_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(REQUIRED)
    one, other = (
        parse(["--config", str(tmp_path / "run.yaml"), f"--max{sign}tokens", "9", f"--max{sign}length=8"])
        for sign in "-_"
    )
    assert one[0] == other[0]
    assert (one[0].max_tokens, one[1].max_length, other[1].max_length) == (9, 8, 8)
    for option in ("--max-tokens", "--max_tokens"):
        assert "valid integer" in CliRunner().invoke(app, ["generate", "d", "hi", option, "x"], env=WIDE).stderr


@pytest.mark.parametrize("command", ["generate d hi", "score rows.jsonl --model m --out o", "train"])
def test_a_gpu_that_is_not_there_is_one_sentence(
    command: str, pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    spec = ModelSpec(str(pair["base"]))
    CoLLM(spec, [spec], DeferralHead(32, 1), load_tokenizer(spec)).save_pretrained("d")
    required = "--base b --assistant a --data d --output-dir o" if command == "train" else ""
    done = CliRunner().invoke(app, f"{command} {required} --device cuda".split())
    message = "device is cuda, but torch finds no CUDA GPU here; use cpu, or leave the device out"
    assert (type(done.exception), str(done.exception)) == (ConfigError, message)


def test_the_help_of_train_begins_with_what_is_common() -> None:
    short, whole = (CliRunner().invoke(app, ["train", one], env=WIDE).stdout for one in ("--help", "--help-all"))
    assert len(short.splitlines()) <= 100
    for text in ("--base", "[required]", "--deferral-cost", "--metric", "true|false"):
        assert text in short
    for name in ("--warmup-steps", "--lora-r", "--rates"):
        assert name not in short
        assert name in whole
    for text in ("<class", "| None", "--label-smoothing-factor"):
        assert text not in whole
    assert not re.search(r"^│ +--[\w-]+ +[A-Z|a-z]+(?: \.\.)? *│$", whole, flags=re.MULTILINE), "an option has no help"


@pytest.mark.slow
def test_every_command_and_flag_in_readme_and_guide_exists() -> None:
    pages = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/guide.md"))
    commands = re.findall(r"(?:^|`)collm ([\w-]+)([^`\n]*)", re.sub(r" \\\n +", " ", pages), flags=re.MULTILINE)
    groups = {group.name for group in app.registered_groups}
    assert {name for name, _ in commands} == {command.name for command in app.registered_commands} | groups
    for name, rest in commands:
        help_text = help_of(name)
        for flag in re.findall(r"--\w[\w-]*", rest):
            assert flag in help_text, (name, flag)


def help_of(command: str) -> str:
    done = [CliRunner().invoke(app, [command, option], env=WIDE) for option in ("--help-all", "--help")]
    return next(one.output for one in done if one.exit_code == 0)


def test_env_names_versions_and_devices() -> None:
    output: Any = CliRunner().invoke(app, ["env"]).output
    assert re.search(r"torch +2\.", output)
    assert "gpu" in output


@pytest.mark.slow
def test_score_on_a_server(pair: dict[str, Path], tmp_path: Path) -> None:
    """The scores are those of the model in memory, under the name that training looks for."""
    module = AutoModelForCausalLM.from_pretrained(pair["assistant"])
    name = str(pair["assistant"])
    common = ["score", pair["data"], "--model", name, "--tokenizer", pair["base"]]
    with FakeServer(module, model=name) as server:
        done = succeeds(*common, "--server", server.url, "--out", tmp_path / "remote", cwd=tmp_path)
    here = collm(*common, "--out", tmp_path / "local", cwd=tmp_path)
    assert here.stdout.split(";")[0] == done.stdout.split(";")[0]
