"""What a collaboration or a run of somebody else can do: neither send, run nor read anything outside of it."""

from __future__ import annotations

import http.server
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, CoLLMConfig, DeferralHead, ModelSpec, ToolSpec
from collm.cli.train import parse
from collm.errors import ArtefactError, CollmError, ConfigError, LoadError, WriteError
from collm.evaluation.answers import AnswerFile
from collm.evaluation.run_report import report_of
from collm.models.loading import load_model, load_tokenizer
from collm.redaction import redacted_command, redacted_options
from collm.run import RunConfig
from collm.run.calibrate import PastRun
from collm.run.train import check_directory, claim_directory
from collm.training.data import load_rows
from collm.untrusted import MAX_JSON_BYTES, contained
from tests.processes import collm

SavedModel = Callable[..., Path]
ADAPTER = "adapter/adapter_config.json"


@pytest.fixture
def saved(saved_model: SavedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A collaboration whose assistant is a table, so that it has a file of each kind."""
    table = tmp_path / "facts.csv"
    table.write_text("pattern,a,b\nw1 {a} {b},w2,w3\n")
    base = ModelSpec(str(saved_model("base", 0)))
    model = CoLLM(base, [ToolSpec.parse(f"tool:lookup:{table}")], DeferralHead(32, 1), tokenizer)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change(directory: Path, name: str = "collm.json", **fields: Any) -> None:
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """An address, and the requests that came to it."""
    came: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            came.append(self.rfile.readline().decode())
            self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", came
    server.shutdown()
    server.server_close()


# Where prompts go


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    ["generate", "chat", "calibrate", "eval", pytest.param("lm-eval", marks=pytest.mark.soak), "serve", "export"],
)
def test_no_command_calls_an_address_of_an_artefact(
    command: str, saved: Path, listener: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, came = listener
    monkeypatch.setenv("MY_SECRET", "hf_secret")
    change(saved, servers={"urls": [address, address], "api_key_env": "MY_SECRET"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "w1", "completion": "w2"}\n')
    more = {
        "generate": [saved, "w1 w2", "--threshold", "0.5"],
        "chat": [saved, "--threshold", "0.5"],
        "calibrate": [saved, "--data", rows],
        "eval": [saved, "--task", "rows", "--data", rows, "--out", tmp_path / "out"],
        "lm-eval": [saved, "--tasks", "arc_easy"],
        "serve": [saved, "--port", "0"],
        "export": ["vllm", saved, tmp_path / "export"],
    }[command]
    refused = collm(command, *more, cwd=tmp_path)
    assert refused.returncode == 1
    assert "unknown field 'servers'" in refused.stderr
    assert came == []


# What is run


def past_run(directory: Path, **changes: Any) -> Path:
    config = RunConfig(data="d.jsonl", base="b", assistant=["a"])
    args = CoLLMConfig(output_dir=str(directory), use_cpu=True, hub_token="hf_secret")
    claim_directory(directory, config, args)
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    return directory


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "this:d"},
        {"metric": "os:symlink"},
        {"format": "this:d"},
        {"assistant": ["a", "tool:this:d"]},
        {"assistant": "tool:os:system"},
    ],
)
def test_a_run_directory_names_no_function_that_is_called(changes: dict[str, Any], tmp_path: Path) -> None:
    run = past_run(tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match=r"run.yaml would run .*--trust-code"):
        PastRun.read(run)
    (tmp_path / "stranger.yaml").write_text((run / "run.yaml").read_text())
    with pytest.raises(ConfigError, match=r"stranger.yaml would run .*--trust-code"):
        parse(["--config", str(tmp_path / "stranger.yaml")])


def test_a_function_is_trusted_by_a_flag_or_by_naming_it(tmp_path: Path) -> None:
    metric = "collm.evaluation.metrics:token_f1"
    run = past_run(tmp_path / "run", metric=metric)
    assert PastRun.read(run, trust_code=True).config.metric == metric
    path = str(tmp_path / "mine.yaml")
    Path(path).write_text(f"{{base: b, assistant: a, data: d, output_dir: o, use_cpu: true, metric: '{metric}'}}")
    assert parse(["--config", path, "--trust-code"])[0].metric == metric
    assert parse(["--config", path, "--metric", metric])[0].metric == metric
    assert parse(["--config", path, "--metric", "contains"])[0].metric == "contains"


@pytest.mark.slow
def test_calibrate_calls_no_metric_of_a_run_directory(saved: Path, tmp_path: Path) -> None:
    run = past_run(tmp_path / "run", metric="os:symlink")
    saved.rename(run / "collaboration")
    refused = collm("calibrate", run / "collaboration", cwd=tmp_path)
    assert refused.returncode == 2
    assert "would run os:symlink, which is not part of collm" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "- a", "seed: 1", "a: [", "seed: x", "[" * 500, "!!python/object:os.x {}"])
def test_a_damaged_run_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"run.yaml is damaged"):
        PastRun.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"base": 3}, "base is 3, expected str"),
        ({"base": None}, "base is None, expected str"),
        ({"assistant": 3}, "run.yaml is damaged"),
        ({"assistant": [["a"]]}, r"assistant is \[\['a'\]\], expected list\[str\]"),
        ({"assistant": {"a": 1}}, "assistant is .*, expected list"),
        ({"data": ["d"]}, "data is .*, expected str"),
        ({"validation": 3}, r"validation is 3, expected str \| None"),
        ({"metric": ["contains"]}, "metric is .*, expected str"),
        ({"rates": 0.5}, r"rates is 0.5, expected list\[float\]"),
        ({"rates": [True]}, r"rates is \[True\], expected list\[float\]"),
        ({"rates": [float("nan")]}, r"rates is \[nan\], expected list\[float\]"),
        ({"stop": "x"}, "stop is 'x', expected list"),
        ({"max_tokens": "many"}, "max_tokens is 'many', expected int"),
        ({"calibrate": "no"}, "calibrate is 'no', expected bool"),
        ({"tool_eps": "x"}, "tool_eps is 'x'"),
        ({"refine": 1.5}, "refine is 1.5, expected int"),
        ({"accept_differences": "eos"}, "accept_differences is 'eos'"),
        ({"data_split": 3}, "data_split is 3"),
        ({"max_length": float("inf")}, "run.yaml is damaged"),
        ({"max_length": -1}, "run.yaml is damaged"),
        ({"base": "x" * 300_000}, "expected at most 262144"),
    ],
)
def test_values_of_another_kind_in_a_run_are_one_sentence(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        PastRun.read(past_run(tmp_path / "run", **changes))
    assert len(str(caught.value)) < 1000


def test_aliases_of_a_run_do_not_unfold(tmp_path: Path) -> None:
    run = past_run(tmp_path / "run")
    bomb = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}' if n else 'y'] * 9)}]\n" for n in range(12))
    config = RunConfig(data="d", base="b", assistant=["a"])
    args = CoLLMConfig(output_dir=str(run), use_cpu=True)
    (run / "run.yaml").write_text(bomb + (run / "run.yaml").read_text().replace("base: b", "base: *x11"))
    for read in (
        lambda: PastRun.read(run),
        lambda: check_directory(run, config, args),
        lambda: parse(["--config", str(run / "run.yaml")]),
    ):
        with pytest.raises(ConfigError, match=r"run.yaml"):
            read()
    (run / "run.yaml").write_text("base: 0x" + "f" * 9000)
    with pytest.raises(ConfigError, match=r"run.yaml is damaged"):
        PastRun.read(run)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("named", ["stranger/kernel", "kernels-community/flash-attn2", ["stranger/kernel"], 3])
def test_a_model_names_no_kernel_that_is_downloaded(field: str, named: Any, saved_model: SavedModel) -> None:
    directory = saved_model("model", 0)
    change(directory, "config.json", **{field: named})
    with pytest.raises(LoadError, match=f"requires the attention {re.escape(repr(named))}, which is not part of"):
        load_model(ModelSpec(str(directory)))


@pytest.mark.parametrize("where", ["config", "option"])
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_the_installed_one_or_none(
    name: str, where: str, saved_model: SavedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention", lambda name, **options: fetched.append(name)
    )
    directory = saved_model("model", 0)
    if where == "config":
        change(directory, "config.json", attn_implementation=name)
        assert load_model(ModelSpec(str(directory), attention="sdpa")).config._attn_implementation == "sdpa"
    with pytest.raises(LoadError, match=f"requires the attention '{name}', whose package is not installed"):
        load_model(ModelSpec(str(directory), attention=name if where == "option" else None))
    assert fetched == []


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"experts_implementation": "sonicmoe"}, "requires the experts 'sonicmoe', which is not part of transformers"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "is quantized with mxfp4, .* run kernels from the Hub"),
    ],
)
def test_other_kernels_are_not_fetched_either(
    fields: dict[str, Any], complaint: str, saved_model: SavedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collm.models.checks.is_kernels_available", lambda: True)
    directory = saved_model("model", 0)
    change(directory, "config.json", **fields)
    with pytest.raises(LoadError, match=complaint):
        load_model(ModelSpec(str(directory)))


def test_an_artefact_names_no_kernel_either(saved: Path) -> None:
    base = json.loads((saved / "collm.json").read_text())["base"]
    change(saved, base={**base, "attention": "stranger/kernel"})
    with pytest.raises(ArtefactError, match=r"attention of .* is 'stranger/kernel', expected one of eager"):
        CoLLM.from_pretrained(saved)


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_beside_a_model_is_not_run(kind: str, saved_model: SavedModel, tmp_path: Path) -> None:
    directory = saved_model("model", 0)
    (directory / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\n")
    name, autos = {
        "model": ("config.json", {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C"}),
        "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": ["code.C", "code.C"]}),
    }[kind]
    change(directory, name, auto_map=autos, **({"model_type": "unheard-of"} if kind == "model" else {}))
    load = load_model if kind == "model" else load_tokenizer
    try:
        load(ModelSpec(str(directory)))
    except LoadError as error:
        assert "custom code" in str(error)  # noqa: PT017 - a tokenizer loads without its code
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_hold_nothing_but_tensors(saved_model: SavedModel, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "ran"), "w"))

    directory = saved_model("model", 0)
    (directory / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, directory / "pytorch_model.bin")
    with pytest.raises(LoadError):
        load_model(ModelSpec(str(directory)))
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def adapted(saved_model: SavedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A collaboration whose base has an adapter."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base: Any = get_peft_model(load_model(ModelSpec(str(saved_model("base", 0)))), lora)
    CoLLM(base, [ToolSpec.parse("tool:calculator")], DeferralHead(32, 1), tokenizer).save_pretrained(
        tmp_path / "adapted"
    )
    return tmp_path / "adapted"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"peft_type": "XLORA", "adapters": {"a": "stranger/adapter"}, "hidden_size": 32}, "peft_type is 'XLORA'"),
        ({"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "stranger/x"}, "peft_type is 'PROMPT_TUNING'"),
        ({"peft_type": "SHADOW", "shadow_model": "stranger/model"}, "peft_type is 'SHADOW'"),
        ({"peft_type": ["LORA"]}, r"peft_type is \['LORA'\]"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "peft.evil"}, "megatron_config is|megatron_core is"),
        ({"init_lora_weights": "corda", "corda_config": {"cache_file": "/etc/passwd"}}, "corda_config is"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, "eva_config is"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "loftq_config is"),
        ({"init_lora_weights": "pissa_niter_99999999"}, "init_lora_weights is 'pissa_niter_99999999'"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config is"),
        ({"layer_replication": [[0, 2]] * 1000}, "layer_replication is"),
        ({"target_modules": "(.+)+x"}, "which may be too slow to match"),
        ({"target_modules": ".*.*.*.*.*x"}, "which may be too slow to match"),
        ({"rank_pattern": {"(a|a)*b": 2}}, "which may be too slow to match"),
        ({"exclude_modules": [3]}, "exclude_modules contains 3"),
        ({"modules_to_save": [""]}, "modules_to_save contains ''"),
        ({"r": 1 << 40}, "a rank is 1099511627776"),
        ({"r": "2"}, "a rank is '2'"),
        ({"rank_pattern": {"q_proj": 1 << 40}}, "a rank is 1099511627776"),
        ({"target_modules": ["q_proj", "k_proj"]}, "missing adapter keys"),
    ],
)  # fmt: skip
def test_an_adapter_is_plain_lora(fields: dict[str, Any], complaint: str, adapted: Path) -> None:
    change(adapted, ADAPTER, **fields)
    with pytest.raises(LoadError, match=complaint):
        assert CoLLM.from_pretrained(adapted).members


def test_an_adapter_that_could_not_be_loaded_is_not_saved(
    saved_model: SavedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    from peft import IA3Config, get_peft_model

    base = load_model(ModelSpec(str(saved_model("tuned"))))
    tuned = get_peft_model(base, IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"))
    model = CoLLM(tuned, [ModelSpec(str(saved_model("other", 1)))], DeferralHead(32, 1), tokenizer)
    with pytest.raises(LoadError, match="peft_type is 'IA3', expected 'LORA'"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_names_no_other_base_and_no_class(adapted: Path) -> None:
    expected = CoLLM.from_pretrained(adapted).generate("w1", threshold=1)[0].text
    auto = {"base_model_class": "system", "parent_library": "os"}
    change(
        adapted, ADAPTER, base_model_name_or_path="stranger/model", revision="x", auto_mapping=auto, unheard_of="y/z"
    )
    model = CoLLM.from_pretrained(adapted)
    with pytest.warns(UserWarning, match="unheard_of"):
        assert model.generate("w1", threshold=1)[0].text == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"[" * 100_000, b"\xff" * 9, b"{}" * (1 << 20)])
def test_a_damaged_adapter_is_one_sentence(name: str, content: bytes | None, adapted: Path) -> None:
    path = adapted / "adapter" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(LoadError, match=f"{name} is (missing or )?damaged"):
        CoLLM.from_pretrained(adapted)


def test_an_adapter_beside_a_model_is_not_loaded_unasked(saved_model: SavedModel) -> None:
    directory = saved_model("model", 0)
    (directory / "adapter_config.json").write_text('{"peft_type": "XLORA", "base_model_name_or_path": "stranger/x"}')
    with pytest.raises(LoadError, match="contains an adapter next to a model"):
        load_model(ModelSpec(str(directory)))


# What is read and written


@pytest.fixture
def calibrated(saved_model: SavedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A run as training leaves it, without its scores, that names a place outside of it for them."""
    base, assistant = (str(saved_model(name, seed)) for name, seed in (("base", 0), ("assistant", 1)))
    run = past_run(tmp_path / "run", base=base, assistant=[assistant], scores=str(tmp_path / "outside"))
    (run / "validation.jsonl").write_text('{"prompt": "w1", "completion": "w2"}\n' * 2)
    model = CoLLM(ModelSpec(base), [ModelSpec(assistant)], DeferralHead(32, 1), tokenizer)
    model.save_pretrained(run / "collaboration")
    return run


def test_a_run_directory_decides_not_where_scores_are_written(calibrated: Path, tmp_path: Path) -> None:
    model = CoLLM.from_pretrained(calibrated / "collaboration")
    curve = PastRun.read(calibrated).curve(model, quiet=True)
    assert not (tmp_path / "outside").exists()
    written = calibrated / "scores" / "validation"
    assert (written / "assistant" / "scores.json").exists()
    (tmp_path / "outside").mkdir()
    written.rename(tmp_path / "outside" / "validation")  # scores shared by runs are read
    assert PastRun.read(calibrated).curve(model, quiet=True).accuracies.equal(curve.accuracies)
    assert not written.exists()


def test_rows_of_a_run_are_not_read_through_a_link(calibrated: Path, tmp_path: Path) -> None:
    (calibrated / "validation.jsonl").rename(tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match=r"there is no .*run/validation.jsonl with the validation rows; pass --data"):
        PastRun.read(calibrated).rows()
    (calibrated / "validation.jsonl").symlink_to(tmp_path / "rows.jsonl")
    with pytest.raises(ArtefactError, match=r"run/validation.jsonl is a link that leads out of .*run; replace it"):
        PastRun.read(calibrated)


def test_scores_are_not_written_through_a_link(calibrated: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (calibrated / "scores").symlink_to(tmp_path / "target")
    model = CoLLM.from_pretrained(calibrated / "collaboration")
    with pytest.raises(ArtefactError, match=r"run/scores is a link that leads out of .*run; replace it"):
        PastRun.read(calibrated).curve(model, quiet=True)
    with pytest.raises(ArtefactError, match=r"run/scores is a link that leads out of"):
        check_directory(calibrated, RunConfig(data="d", base="b", assistant=["a"]), CoLLMConfig(use_cpu=True))
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize("table", ["../facts.csv", "tables/../../facts.csv", "/etc/passwd"])
def test_a_table_outside_of_the_artefact_is_not_read(table: str, saved: Path) -> None:
    change(saved, assistants=[{"name": "lookup", "argument": table, "engine": "python"}])
    with pytest.raises(ArtefactError, match=r"has the table .*, expected a path inside of it"):
        CoLLM.from_pretrained(saved)


@pytest.mark.parametrize("name", ["tables/assistant.csv", "head.safetensors", "base"])
def test_a_link_out_of_the_artefact_is_not_followed(name: str, saved: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    (saved / name).unlink(missing_ok=True)
    (saved / name).symlink_to(outside)
    with pytest.raises(ArtefactError, match=f"{name} is a link that leads out of {saved}; replace it"):
        CoLLM.from_pretrained(saved)


def test_a_hub_snapshot_is_made_of_links(saved: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    saved.rename(snapshot)
    (snapshot / "head.safetensors").rename(blobs / ("ab" * 32))
    (snapshot / "head.safetensors").symlink_to(Path("..", "..", "blobs", "ab" * 32))
    assert CoLLM.from_pretrained(snapshot).head.num_assistants == 1
    (snapshot / "data").mkdir()
    (snapshot / "data" / "rows").symlink_to(Path("..", "..", "..", "blobs", "ab" * 32))
    contained(snapshot / "data")


@pytest.mark.parametrize(
    ("directory", "target"),
    [
        ("snapshots/saved", "../secret"),
        ("snapshots/saved", "../../secret"),
        ("me/snapshots/saved", f"../../blobs/{'ab' * 32}"),
        ("models--a--b/snapshots/0123", "../../secret"),
        ("models--a--b/snapshots/0123", "../4567/secret"),
        ("models--a--b/snapshots/0123", "../../blobs/secret"),
        ("models--a--b/snapshots/0123", f"../../blobs/more/{'ab' * 32}"),
        ("models--a--b/snapshots/0123", f"../../blobs/{'ab' * 20}"),
        ("models--a--b/other/0123", f"../../blobs/{'ab' * 32}"),
        ("models--a--b/snapshots/0123", f"../../../models--c--d/blobs/{'ab' * 32}"),
        ("saved", "../saved2/secret"),
    ],
)
def test_no_name_of_a_parent_lets_links_out(directory: str, target: str, tmp_path: Path) -> None:
    place = tmp_path / directory
    place.mkdir(parents=True)
    (place / "link").symlink_to(target)
    aimed = Path(os.path.normpath(place / target))
    aimed.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "private").write_text("secret")
    aimed.symlink_to(tmp_path / "private") if len(aimed.name) == 40 else aimed.write_text("secret")
    with pytest.raises(ArtefactError, match="link is a link that leads out of"):
        contained(place)


def test_links_that_go_in_circles_and_pipes_end_in_a_sentence(saved: Path) -> None:
    (saved / "README.md").unlink()
    (saved / "README.md").symlink_to("README.md")
    assert CoLLM.from_pretrained(saved).head.num_assistants == 1  # nothing reads it
    os.mkfifo(saved / "calibration.json")
    with pytest.raises(ArtefactError, match=r"calibration.json is a pipe, expected a file; remove it"):
        CoLLM.from_pretrained(saved)


@pytest.mark.parametrize(
    "name", ["results.json", "items.json", "candidates.json", "answers", "answers/collaboration.jsonl", "report.html"]
)
def test_a_report_neither_reads_nor_writes_through_a_link(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir() if name == "answers" else outside.write_text('{"a": 1}\nhalf a line')
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(outside)
    for act in (report_of, lambda run: AnswerFile(run / "answers" / "collaboration.jsonl", {})):
        if act is report_of or name == "answers/collaboration.jsonl":
            with pytest.raises((ArtefactError, WriteError), match=r"leads out of|could not write|is damaged"):
                act(tmp_path / "run")
    assert outside.is_dir() or outside.read_text() == '{"a": 1}\nhalf a line'


@pytest.mark.parametrize("listed", ["{outside}/rows.jsonl", "../outside/rows.jsonl", "{address}/rows.jsonl"])
def test_a_data_set_names_no_files_outside_of_it(listed: str, listener: tuple[str, list[str]], tmp_path: Path) -> None:
    address, came = listener
    directory, outside = tmp_path / "data", tmp_path / "outside"
    for place in (directory, outside):
        place.mkdir()
        (place / "rows.jsonl").write_text(json.dumps({"prompt": place.name, "completion": "c"}) + "\n")
    listed = listed.format(outside=outside, address=address)
    (directory / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {listed}\n---\n")
    assert [row.prompt for row in load_rows(directory)] == ["data"]
    assert came == []


@pytest.mark.parametrize("name", ["../outside/data.arrow", "{outside}/data.arrow", "link.arrow"])
def test_a_saved_data_set_names_none_either(name: str, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "data")
    rows.save_to_disk(tmp_path / "outside")
    next((tmp_path / "outside").glob("*.arrow")).rename(tmp_path / "outside" / "data.arrow")
    (tmp_path / "data" / "train" / "link.arrow").symlink_to(tmp_path / "outside" / "data.arrow")
    if name != "link.arrow":
        (tmp_path / "data" / "train" / "link.arrow").unlink()
    change(tmp_path / "data/train", "state.json", _data_files=[{"filename": name.format(outside=tmp_path / "outside")}])
    with pytest.raises(ArtefactError, match=r".arrow is a link that leads out of|data.arrow is out of"):
        load_rows(tmp_path / "data")


@pytest.mark.parametrize("name", ["rows.jsonl", "train/rows.jsonl", "train", "data.parquet"])
def test_links_of_a_data_set_are_not_followed(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    link = tmp_path / "data" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside if name == "train" else outside / "rows.jsonl")
    with pytest.raises(ArtefactError, match="is a link that leads out of"):
        load_rows(tmp_path / "data")


# Absurd files


@pytest.mark.parametrize("name", ["collm.json", "calibration.json"])
def test_a_file_too_long_to_be_one_is_not_read(name: str, saved: Path) -> None:
    with (saved / name).open("wb") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ArtefactError, match=f"{name} .*has {MAX_JSON_BYTES + 1} bytes"):
        CoLLM.from_pretrained(saved)


@pytest.mark.parametrize(
    "head",
    [{"hidden_size": 1 << 50, "num_assistants": 1}, {"hidden_size": -1, "num_assistants": 1}, {"hidden_size": 32}, []],
)
def test_a_head_of_an_absurd_shape_takes_no_memory(head: Any, saved: Path) -> None:
    change(saved, head=head)
    with pytest.raises(ArtefactError, match=r"expected .*weight|expected hidden_size|expected dict"):
        CoLLM.from_pretrained(saved)


def test_a_head_with_more_in_it_is_refused(saved: Path) -> None:
    save_file(
        {"weight": torch.zeros(1, 32), "bias": torch.zeros(1), "more": torch.zeros(1)}, saved / "head.safetensors"
    )
    with pytest.raises(ArtefactError, match="belongs to another pair"):
        CoLLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("collm.json", ["default_threshold"], float("nan")),
        ("collm.json", ["default_threshold"], 10**12),
        ("collm.json", ["default_threshold"], True),
        ("collm.json", ["base", "revision"], float("nan")),
        ("collm.json", ["base", "device"], 10**12),
        ("collm.json", ["assistants", 0, "seconds"], float("inf")),
        ("collm.json", ["assistants", 0, "max_answer"], 1.5),
        ("collm.json", ["template", "turn_ends"], [10**12]),
        ("collm.json", ["template", "turn_ends"], [-1]),
        ("collm.json", ["accept_differences"], [float("nan")]),
        ("collm.json", ["versions", "torch"], 10**12),
        ("calibration.json", ["points", 0, "threshold"], float("nan")),
        ("calibration.json", ["points", 0, "metric"], 10**12),
        ("calibration.json", ["points", 0, "deferral_rate"], "x"),
        ("calibration.json", ["points", 0, "rate_low"], float("nan")),
        ("calibration.json", ["points"], []),
        ("calibration.json", ["num_prompts"], float("nan")),
        ("calibration.json", ["budgets"], [10**12]),
        ("calibration.json", ["checks", 0, "rate_difference"], [float("nan"), 0.1]),
        ("calibration.json", ["checks", 0, "rate_difference"], [0.1]),
        ("calibration.json", ["checks", 0, "held_out", "low"], -1),
    ],
)
def test_impossible_numbers_are_refused(name: str, path: list[Any], value: Any, saved: Path) -> None:
    point = {"threshold": 0.5, "deferral_rate": 0.1, "metric": 0.5, "low": 0, "high": 1, "rate_low": 0, "rate_high": 1}
    check = {"budget": 1, "num_prompts": 2, "rate_difference": [-0.1, 0.1], "metric_difference": [-0.1, 0.1]}
    checks = [{**check, "promised": point, "held_out": point}]
    calibration = {"points": [point], "metric_name": "contains", "num_prompts": 2, "settings": {}, "checks": checks}
    (saved / "calibration.json").write_text(json.dumps(calibration))
    assert CoLLM.from_pretrained(saved).calibration is not None
    content = part = json.loads((saved / name).read_text())
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (saved / name).write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match=f"{name} is damaged"):
        CoLLM.from_pretrained(saved)


@pytest.mark.slow
@pytest.mark.parametrize(
    "field", ["base", "assistants", "template", "accept_differences", "training", "tokenizer_hash"]
)
@pytest.mark.parametrize("value", [None, 1, "x", [1], {"a": 1}, [{"engine": "python"}]])
def test_any_field_of_another_kind_is_an_error_of_ours(field: str, value: Any, saved: Path) -> None:
    before = json.loads((saved / "collm.json").read_text())[field]
    change(saved, **{field: value})
    if isinstance(value, dict) and isinstance(before, dict) and field == "training":
        CoLLM.from_pretrained(saved)  # free form
        return
    with pytest.raises(CollmError):
        CoLLM.from_pretrained(saved)


# Secrets


def test_no_secret_reaches_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["collm", "train", "--hub_token", "hf_secret", "--data", "https://me:hf_secret@h/d"]
    )
    secret = "https://me:hf_secret@h/d"
    config = RunConfig(data="d", base="b", assistant=["a", secret], stop=["?token=hf_secret"], budgets=[0.5])
    args = CoLLMConfig(output_dir=str(tmp_path / "run"), use_cpu=True, hub_token="hf_secret", report_to=[secret])
    claim_directory(tmp_path / "run", config, args)
    for path in (tmp_path / "run").iterdir():
        assert "hf_secret" not in path.read_text()
    check_directory(tmp_path / "run", config, args)
    assert redacted_options({"a": ({"hub_token": "s", "b": secret},)}) == {
        "a": [{"hub_token": None, "b": "https://<redacted>@h/d"}]
    }


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--api-key", "s", "--out", "o"], ["--api-key", "<redacted>", "--out", "o"]),
        (["--hub_token=s"], ["--hub_token=<redacted>"]),
        (["--server", "http://u:s@host/v1"], ["--server", "http://<redacted>@host/v1"]),
        (
            ["https://h/d?rows=3&access_token=s&api-key=s#top", "https://h/d?X-Amz-Signature=s"],
            [
                "https://h/d?rows=3&access_token=<redacted>&api-key=<redacted>#top",
                "https://h/d?X-Amz-Signature=<redacted>",
            ],
        ),
        (["--api-key-env", "NAME", "--max_tokens", "3"], ["--api-key-env", "NAME", "--max_tokens", "3"]),
    ],
)
def test_a_command_line_is_kept_without_its_secrets(given: list[str], kept: list[str]) -> None:
    assert redacted_command(given) == kept
