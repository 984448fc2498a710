"""What a first user meets: answers at once, on the right stream, without the noise of libraries."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, CoLLMConfig, DeferralHead, ModelSpec
from collm.artefact import local_directory
from collm.errors import ArtefactError, LoadError, MismatchError, MissingExtra
from collm.models.loading import load_model, load_tokenizer
from collm.models.names import looks_like_path
from collm.run import RunConfig, train_collaboration
from collm.text.guards import check_eos
from collm.text.template import PromptTemplate
from tests.processes import collm

SavedModel = Callable[..., Path]
CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("socket.create_connection", asked)
    monkeypatch.setattr("httpx.Client.send", asked)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["./modle", "/nowhere/model", "a/b/c", "~/nothing-of-that-name", "HERE/modle"])
def test_a_mistyped_path_is_answered_at_once(name: str, saved_model: SavedModel, tmp_path: Path) -> None:
    saved_model("model")
    name = name.replace("HERE", str(tmp_path))
    for load in (load_model, load_tokenizer):
        with pytest.raises(LoadError, match=r"there is no model at .*: no such directory"):
            load(ModelSpec(name))
    with pytest.raises(LoadError, match=r"did you mean '.*/model'\?"):
        load_model(ModelSpec(str(tmp_path / "modle")))


@pytest.mark.usefixtures("no_hub")
def test_a_mistyped_collaboration_is_answered_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-run").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("my-run/colaboration", "./run/collaboration", "collaboration"):
        with pytest.raises(ArtefactError, match=r"there is no collaboration at .*: no such directory"):
            CoLLM.from_pretrained(name)
    assert local_directory("my-run/other", None) == Path("my-run/other")


@pytest.mark.parametrize(
    ("name", "path"), [("gpt2", False), ("openai/gsm8k", False), ("./gpt2", True), ("a/b/c", True)]
)
def test_names_of_the_hub_are_told_from_paths(name: str, *, path: bool) -> None:
    assert looks_like_path(name) is path


def test_models_that_end_texts_differently_name_the_option() -> None:
    with pytest.raises(MismatchError, match="--accept_differences eos"):
        check_eos([("base", frozenset({2})), ("assistant", frozenset({2, 28}))])


def test_what_libraries_say_of_themselves_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {
        "DeepSpeed": "Setting accelerator to CPU. If you have GPU or other accelerator, ..",
        "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community: ..",
    }.items():
        logger, handler = logging.getLogger(name), logging.StreamHandler(sys.stdout)
        logger.addHandler(handler)
        try:
            logger.warning(text)
            logger.warning("something that matters")
        finally:
            logger.removeHandler(handler)
    assert capsys.readouterr().out == "something that matters\n" * 2


@pytest.mark.parametrize(
    ("package", "extra", "options", "training"),
    [
        ("peft", "train", {}, {"method": "lora"}),
        ("bitsandbytes", "quantize", {"base_quantization": "nf4"}, {"method": "head"}),
        ("bitsandbytes", "quantize", {"assistant_quantization": "int8"}, {}),
    ],
)
def test_what_is_not_installed_is_said_before_any_work(
    package: str, extra: str, options: dict[str, str], training: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    config = RunConfig(data="nowhere.jsonl", base="nowhere", assistant=["nowhere"], **options)  # type: ignore[arg-type]
    args = CoLLMConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **training)
    with pytest.raises(MissingExtra, match=rf"{package} .*collm\[{extra}\]"):
        train_collaboration(config, args, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_generate_says_that_rows_were_chats_and_what_an_empty_answer_means(
    saved_model: SavedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    specs = [ModelSpec(str(saved_model(name, seed))) for name, seed in (("base", 0), ("assistant", 1))]
    free = CoLLM(specs[0], specs[1:], DeferralHead(32, 1), tokenizer)
    (first,) = free.generate("w1 w2", threshold=1)[0].token_ids[:1]
    template = PromptTemplate(chat=CHAT, turn_ends=(first,))
    saying = CoLLM(specs[0], specs[1:], DeferralHead(32, 1), tokenizer, template=template, training={"rows": "chats"})
    saying.save_pretrained(tmp_path / "saved")
    done = collm("generate", tmp_path / "saved", "w1 w2", "--threshold", "1", cwd=tmp_path)
    assert done.stderr.splitlines() == [
        "this collaboration was trained on chats; --chat sends the prompt as a user's message",
        "the answer is empty: the base ended the text at once",
    ]
    assert done.stdout == "\n"
    chatted = collm("generate", tmp_path / "saved", "w1 w2", "--threshold", "1", "--chat", "--json", cwd=tmp_path)
    assert chatted.stderr == ""
    assert json.loads(chatted.stdout)["text"] == ""


@pytest.mark.slow
def test_a_clean_run_shows_what_it_made_and_nothing_else(saved_model: SavedModel, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{i % 9}", "completion": f"w{i % 5} w{i % 7}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = collm(
        "train", "--base", saved_model("base", 0), "--assistant", saved_model("assistant", 1), "--data", "rows.jsonl",
        "--output_dir", "run", "--method", "lora", "--max_tokens", "2", "--num_train_epochs", "1",
        "--use_cpu", "true", "--warm_start", "false", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for noise in ("Loading weights", "Writing model", "real_accelerator", "gemm_4bit", "Warning", "kernels"):
        assert noise not in done.stdout
        assert noise not in done.stderr
