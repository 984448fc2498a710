"""The code in the documents runs as it stands."""

from __future__ import annotations

import json
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM

from collm.evaluation.metrics import metric_named
from tests.processes import collm
from tests.tiny_models import make_model, tiny_config
from tests.tokenizers import merging_tokenizer

DOCS = Path(__file__).parents[1] / "docs"
REST = "two days on foot"


def blocks(page: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


def page_rows(number: Callable[[int], str], rest: Callable[[], str] = lambda: REST) -> list[dict[str, str]]:
    """Rows like the page's, with this number of kilometres for so many miles, and this end of the sentence."""
    (row,) = (json.loads(block) for block in blocks("tools.md", "json"))
    return [
        {
            "prompt": row["prompt"].replace("12", str(miles)),
            "completion": row["completion"].replace("19.3", number(miles)).replace(REST, rest()),
        }
        for miles in range(10, 90)
    ]


def make_base(directory: Path) -> None:
    """A small model that writes sentences like the page's, with any number and any end: never exactly a row's."""
    rng = random.Random(0)

    def rest() -> str:
        ends = ["two", "three", "nine", "ten"], ["hours", "days"], ["on foot", "by boat", "by bus"]
        return " ".join(rng.choice(words) for words in ends)

    texts = [
        (row["prompt"] + row["completion"]).replace("trail", rng.choice(["trail", "river", "road"]))
        for _ in range(20)
        for row in page_rows(lambda miles: f"{rng.randrange(10, 99)}.{rng.randrange(10)}", rest)
    ]
    tokenizer = merging_tokenizer(*texts[:80], vocab_size=300)
    torch.manual_seed(0)
    changes = {"vocab_size": len(tokenizer), "hidden_size": 64, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(tiny_config(**changes, initializer_range=0.02))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        batch = tokenizer([text + "<eos>" for text in texts[10 * step : 10 * step + 10]])["input_ids"]
        ids = pad_sequence([torch.tensor(one) for one in batch], batch_first=True, padding_value=-100)
        loss = model(input_ids=ids.clamp(min=0), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def commands(page: str) -> list[list[str]]:
    """The page's commands, in order."""
    lines = "".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("collm ")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("docs")
    make_base(directory / "my-base")
    return directory


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The page's files, a base and rows like the page's."""
    for block in blocks("tools.md", "python"):
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    rows = page_rows(lambda miles: f"{miles * 1.609344:.1f}")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my-base").symlink_to(made / "my-base")
    return tmp_path


@pytest.mark.soak
def test_the_function_of_the_page_is_learned_in_ten_lines(folder: Path) -> None:
    user_lines = [line for name in ("my_tools.py", "teach.py") for line in (folder / name).read_text().splitlines()]
    assert sum(bool(line.strip()) and not line.startswith(("#", "import", "from")) for line in user_lines) <= 10
    done = subprocess.run([sys.executable, "teach.py"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(" 72.4 km")
    assert "calls=" in done.stdout


@pytest.mark.slow
def test_the_commands_of_the_page_end_in_a_model_that_calls_the_function(folder: Path) -> None:
    train, generate = commands("tools.md")
    for command in (train, generate):
        done = collm(*command, cwd=folder)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" 72.4 km")
    alone = collm(*generate, "--threshold", "1", cwd=folder)
    assert not alone.stdout.startswith(" 72.4 km")


def test_the_metric_of_the_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks("evaluation.md", "python")
    (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    (name,) = re.findall(r"--metric (\w+:\w+)", (DOCS / "evaluation.md").read_text())
    assert [metric_named(name)(text, "72.4 km by bus") for text in ("72.4 km on foot", "", "7.9 km")] == [1, 0, 0]


@pytest.mark.slow
def test_the_other_function_of_the_page_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    days_after = import_module("my_dates").days_after
    assert days_after("The meeting 3 days after 2024-02-28 is") == " 2024-03-02"
    assert days_after("3 days after 2024-02-28 was") is None


CHATS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"


@pytest.mark.soak
def test_the_commands_of_two_small_models_end_in_an_evaluation(tmp_path: Path) -> None:
    """The page's script and commands, with random weights of as many layers in place of SmolLM2."""
    (script,) = blocks("two-models.md", "python")
    (tmp_path / "prepare.py").write_text(script)
    (tmp_path / "recipes").symlink_to(DOCS.parent / "recipes")
    countries = (DOCS.parent / "recipes/facts/data/countries.csv").read_text()
    tokenizer = merging_tokenizer(countries, script, vocab_size=400)
    tokenizer.chat_template = CHATS + "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer.save_pretrained(tmp_path / "assistant")
    changes = {"vocab_size": len(tokenizer), "num_hidden_layers": 30, "eos_token_id": tokenizer.eos_token_id}
    make_model(tiny_config(**changes, max_position_embeddings=256), 0).save_pretrained(tmp_path / "assistant")
    subprocess.run([sys.executable, "prepare.py"], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    printed = []
    for command in commands("two-models.md"):
        done = collm(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    before, tuned, after, trained, text, found = printed
    assert float(first_nll(after)) < float(first_nll(before))
    assert "tuned/model: use it like any model" in tuned
    assert 'collm generate my-run/collaboration --chat "..."' in trained
    assert text
    assert "rows, 120 items" in found
    for page in ("guide.md", "../README.md"):  # what they do with a finished run
        code = next(block for block in blocks(page, "python") if "my-run/collaboration" in block)
        command = [sys.executable, "-c", code]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
        assert ran.returncode == 0, ran.stderr


def first_nll(forecast: str) -> str:
    """The base's NLL in what `collm forecast` prints."""
    return re.findall(r"^ base +([0-9.]+) ", forecast, flags=re.MULTILINE)[0]
