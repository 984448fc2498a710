"""The paper's runs: their configurations are read and fit together."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from collm.cli.main import app
from collm.cli.train import parse
from collm.run import RunConfig
from collm.text.template import PromptTemplate
from collm.training.config import CoLLMConfig
from recipes.paper import rehearse
from recipes.paper.samples import SAMPLES
from tests.text.test_template import TOKENIZERS
from tests.tiny_models import make_model, tiny_config
from tests.tokenizers import merging_tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "paper"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
RUNS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
THEIRS = {  # the authors' code (arXiv 2403.03870)
    "optim": "adamw_torch",
    "learning_rate": 2e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.04,
    "weight_decay": 0.0,
    "num_train_epochs": 2,
    "max_length": 2048,
    "bf16": True,
    "positive_weight": 8,
    "pseudo_label_variant": "a",
}


def written(run: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{run}.yaml").read_text(encoding="utf-8"))


def parsed(run: str) -> tuple[RunConfig, CoLLMConfig]:
    return parse(
        ["--config", str(FOLDER / f"{run}.yaml"), "--use_cpu", "true", "--trust-code"]
    )  # bf16 asks for a GPU otherwise


def test_there_is_one_for_each_training_set() -> None:
    assert set(RUNS) == {"tulu", "gsm8k", "math", "bioasq"}


@pytest.mark.parametrize("run", RUNS)
def test_every_field_is_known_and_arrives(run: str) -> None:
    config, args = parsed(run)
    for name, value in written(run).items():
        got = getattr(config if hasattr(config, name) else args, name)
        expected = {"assistant": [value], "objective": "marginal"}  # which the paper's is
        assert got == expected.get(name, value), name
    assert args.output_dir == f"runs/paper/{run}"


@pytest.mark.parametrize("run", RUNS)
def test_the_hyper_parameters_are_the_authors(run: str) -> None:
    _, args = parsed(run)
    assert {name: getattr(args, name) for name in THEIRS} == THEIRS
    assert args.head_learning_rate == args.learning_rate
    processes = yaml.safe_load((ROOT / "recipes/accelerate/zero2.yaml").read_text())["num_processes"]
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * processes == 128


@pytest.mark.parametrize("run", RUNS)
def test_validation_is_held_out_of_the_training_split(run: str) -> None:
    config, _ = parsed(run)
    assert (config.data_split, config.validation) == (None, None)  # train is the default, rows are held out of it


# Prompts


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("run", sorted(set(RUNS) - {"tulu"}))
def test_training_shows_the_prompts_of_decoding(run: str, tokenizer: PreTrainedTokenizerFast) -> None:
    config, _ = parsed(run)
    template = PromptTemplate(config.template)
    encoded = template.encode_completion(tokenizer, "the cat", "on the mat")
    prompt = encoded.token_ids[: encoded.is_target.index(True)]
    assert prompt == template.encode_prompt(tokenizer, "the cat")


CHAT = [
    {"role": "system", "content": "the mat"},
    {"role": "user", "content": "the cat sat"},
    {"role": "assistant", "content": "on the mat"},
    {"role": "user", "content": "and the dog"},
    {"role": "assistant", "content": "sat on the cat"},
]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_chat_is_one_sequence_whose_answers_end(tokenizer: PreTrainedTokenizerFast) -> None:
    template = PromptTemplate(chat=(FOLDER / "tulu.jinja").read_text())
    (encoded,) = template.encode_chat(tokenizer, CHAT)
    learned = [token for token, wanted in zip(encoded.token_ids, encoded.is_target, strict=True) if wanted]
    eos = tokenizer.eos_token
    assert tokenizer.decode(learned).replace(" ", "") == f"onthemat{eos}satonthecat{eos}"
    for before in (2, 4):
        prompt = template.encode_prompt(tokenizer, CHAT[:before])
        assert encoded.token_ids[: len(prompt)] == prompt
        assert encoded.is_target[len(prompt)]
        assert not encoded.is_target[len(prompt) - 1]


def test_the_chat_template_spells_the_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    template = PromptTemplate(chat=(FOLDER / "tulu.jinja").read_text())
    assert template.render_chat(tokenizer, CHAT[:4], open_turn=True) == (
        "<|system|>\nthe mat\n<|user|>\nthe cat sat\n<|assistant|>\non the mat<eos>\n"
        "<|user|>\nand the dog\n<|assistant|>\n"
    )


# The README


def readme_commands(name: str) -> list[list[str]]:
    """Arguments of the README's `collm name ..` commands as the shell reads them."""
    blocks = re.findall(r"^```\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    script = "".join(block for block in blocks if "collm " in block)
    shell = "collm() { printf '%s\\0' \"$@\"; printf '\\1'; }\naccelerate() { :; }\n" + script
    out = subprocess.run(["bash", "-euc", shell], capture_output=True, text=True, check=True).stdout
    listed = [command.split("\0")[:-1] for command in out.split("\1")[:-1]]
    return [arguments for command, *arguments in listed if command == name]


def test_the_readmes_commands_take_the_configurations() -> None:
    scored = [command for command in readme_commands("score") if "--config" in command]
    assert {Path(command[1]).stem for command in scored} == set(RUNS)
    for command in scored:
        config, _ = parse(["--config", str(ROOT / command[1]), "--use_cpu", "true", "--trust-code"])
        assert command[2:4] == ["--author", "assistant"]
        assert command[3] in config.authors
        assert not config.calibrate
    directories = {parsed(run)[1].output_dir for run in RUNS}
    assert all(str(Path(command[0]).parent) in directories for command in readme_commands("calibrate"))
    assert len(readme_commands("calibrate")) == 1


def test_files_that_the_readme_names_are_there() -> None:
    for name in re.findall(r"recipes/[\w/]+\.(?:yaml|jinja)", README):
        assert (ROOT / name).is_file(), name


# Rehearsals


@pytest.mark.parametrize("run", RUNS)
def test_rows_are_kept_as_they_were(run: str, tmp_path: Path) -> None:
    rows = rehearse.few_rows(run, None, 5)
    kept = rehearse.written_rows(run, rows, tmp_path / "rows")
    assert len(rows) == 5
    assert rehearse.few_rows(run, str(kept), 10) == rehearse.good_rows(run, kept) == rows


@pytest.mark.parametrize(("run", "missing"), [("bioasq", {"exact_answer": None}), ("tulu", {"messages": []})])
def test_rows_that_training_skips_are_not_asked(run: str, missing: dict[str, Any], tmp_path: Path) -> None:
    assert written(run)["bad_rows"] == "skip"
    first, *others = SAMPLES[run]
    kept = rehearse.written_rows(run, [first | missing, *others], tmp_path / "rows")
    assert rehearse.good_rows(run, kept) == others


def test_math_is_read_as_its_publishers_lay_it_out(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "algebra"
    folder.mkdir(parents=True)
    for number, row in enumerate(SAMPLES["math"]):
        (folder / f"{number}.json").write_text(json.dumps(row), encoding="utf-8")
    assert rehearse.few_rows("math", str(tmp_path), 3) == SAMPLES["math"][:3]


def test_tulu_is_read_as_the_hub_has_it(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(SAMPLES["tulu"]), tmp_path / "train.parquet")
    assert rehearse.few_rows("tulu", str(tmp_path / "train.parquet"), 3) == SAMPLES["tulu"][:3]


@pytest.mark.parametrize("run", [pytest.param(run, marks=[] if run == "tulu" else [pytest.mark.soak]) for run in RUNS])
def test_a_run_is_rehearsed_through_every_command(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with the server's part left to the command itself."""
    tokenizer = merging_tokenizer("Ann has boxes of eggs, so the answer is 12.", across_words=False)
    make_model(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=1024), 0).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    asked: list[str] = []
    with_threshold: set[str] = set()

    def in_process(command: Any) -> float:
        asked.append(str(command[0]))
        with_threshold.update({str(command[0])} if "--threshold" in command else ())
        app([str(part) for part in command], standalone_mode=False)
        return 0.0

    changes = rehearse.replaced
    random_weights = {"pseudo_label_variant": "b"}  # are never right, which variant a asks for
    monkeypatch.setattr(rehearse, "replaced", lambda *paths: changes(*paths) | random_weights)
    monkeypatch.setattr(rehearse, "run_command", in_process)
    monkeypatch.setattr(
        rehearse, "serve_once", lambda collaboration, *, chat: asked.append(f"serve {collaboration.name}") or 0.0
    )
    seconds = rehearse.rehearse(run, tmp_path / "model", None, tmp_path / "out", rows=10, layers=1)
    assert asked == ["score", "train", "forecast", "calibrate", "eval", "generate", "serve collaboration"]
    assert with_threshold == {"eval", "generate"}
    assert set(seconds) == {"score", "train", "forecast", "calibrate", "eval", "generate", "serve"}
    config = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text(encoding="utf-8"))
    assert {name: config[name] for name in ("learning_rate", "warmup_steps", "positive_weight")} == {
        name: written(run)[name] for name in ("learning_rate", "warmup_steps", "positive_weight")
    }
