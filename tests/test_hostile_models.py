"""Models, tokenizers and rows that are absurd end in one error that says why: not in a hang, nor in other weights."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from collm.engine.runner import ModelRunner
from collm.errors import CollmError, DataError, LoadError, ModelFailure, RequestError
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec, load_model, load_tokenizer, saved_eos_ids
from collm.text.guards import TokenizerIdentity
from collm.text.template import MAX_CHARACTERS, PromptTemplate, tokenize
from collm.text.token_ids import normalizer_growth
from collm.training.data import MAX_MESSAGES, load_rows
from collm.training.examples import encode

SavedModel = Callable[..., Path]

TURNS = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_weights(directory: Path, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = directory / "model.safetensors"
    save_file(changed(load_file(path)), path, metadata={"format": "pt"})


# Models


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers 1000000, expected at most 1000"),
        ({"num_hidden_layers": 4}, "lack 18 tensors that its config.json requires, such as 'model.layers.2"),
        ({"vocab_size": 99}, r"\w+.weight of .* has shape \(97, 32\), but its config.json requires \(99, 32\)"),
        ({"vocab_size": 2 * 10**9}, "could not load .* allocate"),
        ({"intermediate_size": 10**11}, "could not load .* allocate"),
        ({"hidden_size": "32"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "could not load"),
    ],
)
def test_a_config_of_other_weights_is_refused(
    fields: dict[str, Any], complaint: str, saved_model: SavedModel, caplog: pytest.LogCaptureFixture
) -> None:
    directory = saved_model("model")
    change(directory / "config.json", **fields)
    with pytest.raises(LoadError, match=complaint):
        load_model(ModelSpec(str(directory)))
    assert "LOAD REPORT" not in caplog.text


def test_weights_that_are_lacking_are_not_made_up(saved_model: SavedModel) -> None:
    directory = saved_model("model")
    change_weights(directory, lambda tensors: {name: one for name, one in tensors.items() if "mlp" not in name})
    with pytest.raises(LoadError, match=r"lack 6 tensors .*mlp"):
        load_model(ModelSpec(str(directory)))


def test_weights_that_are_no_numbers_are_named(saved_model: SavedModel) -> None:
    directory = saved_model("model")
    change_weights(directory, lambda tensors: {name: one * float("nan") for name, one in tensors.items()})
    with pytest.raises(ModelFailure, match="base gives logits that are not finite"):
        ModelRunner(LanguageModel(load_model(ModelSpec(str(directory))), name="base"))


@pytest.mark.slow
@pytest.mark.parametrize("eos", [["<eos>", 1], [None], -1, 1.5, {"a": 1}, [[1]], True])
def test_eos_ids_are_token_ids(eos: Any, saved_model: SavedModel) -> None:
    directory = saved_model("model")
    change(directory / "generation_config.json", eos_token_id=eos)
    spec = ModelSpec(str(directory))
    with pytest.raises(LoadError, match="has eos_token_id"):
        saved_eos_ids(spec)
    with pytest.raises(LoadError, match="has eos_token_id"):
        _ = LanguageModel(load_model(spec), name="base").eos_token_ids


def test_a_generation_config_that_cannot_be_read_is_named(saved_model: SavedModel) -> None:
    directory = saved_model("model")
    change(directory / "generation_config.json", watermarking_config={"a": 1})
    with pytest.raises(LoadError, match="could not load the generation config"):
        saved_eos_ids(ModelSpec(str(directory)))


# Tokenizers


def test_a_tokenizer_that_makes_texts_longer_is_refused(saved_model: SavedModel) -> None:
    directory = saved_model("model")
    step = {"type": "Replace", "pattern": {"String": "w"}, "content": "w" * 50}
    change(directory / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [step] * 6})
    with pytest.raises(LoadError, match="may make a text 17596287801 times longer"):
        load_tokenizer(ModelSpec(str(directory)))


def test_an_ordinary_normalisation_is_read(saved_model: SavedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    directory = saved_model("model")
    steps = [
        {"type": "Prepend", "prepend": "_"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
        {"type": "NFKC"},
    ]
    change(directory / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    assert normalizer_growth(load_tokenizer(ModelSpec(str(directory)))) == 2
    assert normalizer_growth(tokenizer) == 1


def test_a_pattern_that_takes_for_ever_is_an_error(saved_model: SavedModel) -> None:
    directory = saved_model("model")
    pattern = {"type": "Replace", "pattern": {"Regex": "(a|a|aa)+$"}, "content": ""}
    change(directory / "tokenizer.json", normalizer=pattern)
    tokenizer = load_tokenizer(ModelSpec(str(directory)))
    assert TokenizerIdentity.of(tokenizer).vocab_size
    with pytest.raises(RequestError, match="the tokenizer fails on the text 'aaa"):
        PromptTemplate().encode_prompt(tokenizer, "a" * 60 + "!")


def test_a_text_that_no_model_reads_is_not_tokenised(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError, match="has 10000001 characters, expected at most 10000000"):
        tokenize(tokenizer, "w" * (MAX_CHARACTERS + 1), special=False)
    loops = "{% for i in range(9999) %}{{ 'w1 ' * 1000 }}{% endfor %}"
    with pytest.raises(RequestError, match="has 29997000 characters"):
        PromptTemplate(chat=loops).encode_prompt(tokenizer, TURNS[:1])


@pytest.mark.parametrize(
    "chat",
    [
        "{{ '\\ud800' }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.__class__.__mro__ }}",
        "{% include '/etc/passwd' %}",
        "{{ (10 ** 100000) | string }}",
        "{{ 'w1 ' * 300000000000000 }}",
        "{% for %}",
        "",
    ],
)
def test_absurd_templates_are_one_error(chat: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError):
        PromptTemplate(chat=chat).encode_prompt(tokenizer, TURNS[:1])


# Rows


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


CALL = '{"messages":[{"role":"user","content":"u"},{"role":"assistant","tool_calls":[{"name":"f","arguments":%s}]}]}'


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (json.dumps({"messages": TURNS * MAX_MESSAGES}), "the chat has 2000 messages, expected at most 1000; split it"),
        (json.dumps({"messages": TURNS})[:-1] + f', "tools": [{{"name": "f", "p": {nested(700)}}}]}}', "too deeply"),
        (CALL % nested(700), "message 2: a call is nested too deeply"),
        (json.dumps({"messages": json.dumps(TURNS)}), "'messages' is a str"),
        ('{"prompt": NaN, "completion": "x"}', "'prompt' is a float"),
        ('{"prompt": "a \0", "completion": "x"}', "bad JSON: Invalid control character"),
    ],
)
def test_absurd_rows_are_one_error(line: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{complaint}"):
        load_rows(path)


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n" * 9, b"\x1f\x8b\x08", "{}".encode("utf-16")])
def test_files_that_hold_no_rows_are_one_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows.jsonl (has no rows|is not UTF-8 text)"):
        load_rows(path)


def test_a_name_that_no_file_has_is_one_error() -> None:
    with pytest.raises(DataError, match=r"there is no '/a.*File name too long"):
        load_rows("/" + "a" * 5000)


@pytest.mark.slow
def test_a_row_of_too_much_text_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "w1 " * MAX_CHARACTERS, "completion": "w2"}))
    with pytest.raises(DataError, match=r"rows.jsonl:1: the text has \d+ characters"):
        encode(load_rows(path), PromptTemplate(), tokenizer, max_length=9)


def test_a_parquet_file_damaged_in_its_middle_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"prompt": f"w{i * 7919 % 10007}", "completion": f"w{i}"} for i in range(50_000)]
    datasets.Dataset.from_list(rows).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 2] = b"\xff" * (len(content) // 2 - len(content) // 4)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows.parquet is not parquet, or damaged after row \d+"):
        load_rows(path)


def test_long_fields_of_a_csv_file_are_read(tmp_path: Path) -> None:
    path, limit = tmp_path / "rows.csv", csv.field_size_limit()
    path.write_text("prompt,completion\nw1," + "w2 " * 60_000 + "\n")
    assert len(load_rows(path)[0].completion) == 180_000
    assert csv.field_size_limit() == limit


def test_a_byte_order_mark_is_no_damage(saved_model: SavedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    from collm import CoLLM, DeferralHead

    base = saved_model("base")
    pair = CoLLM(ModelSpec(str(base)), [ModelSpec(str(base))], DeferralHead(32, 1), tokenizer)
    pair.save_pretrained(base.parent / "pair")
    path = base.parent / "pair" / "collm.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert CoLLM.from_pretrained(path.parent).head.num_assistants == 1


def test_other_reports_of_transformers_pass(saved_model: SavedModel, caplog: pytest.LogCaptureFixture) -> None:
    directory = saved_model("model")
    change(directory / "config.json", num_hidden_layers=1)
    logger = logging.getLogger("transformers")
    before, logger.propagate = (logger.level, logger.propagate), True
    logger.setLevel(logging.WARNING)
    try:
        load_model(ModelSpec(str(directory)))
    except CollmError as error:
        pytest.fail(str(error))
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]
    assert "UNEXPECTED" in caplog.text


@pytest.mark.parametrize(
    ("listed", "complaint"),
    [
        (3, "or damaged"),
        ([{"filename": 3}], "or damaged"),
        ([{"filename": "\0"}], "or damaged"),
        ([{"filename": ""}], "cannot be read: Is a directory"),
        ([{"filename": "none.arrow"}], "is not arrow, or damaged after row 0"),
        ([], "has no rows"),
    ],
)
def test_a_saved_data_set_of_absurd_files_is_one_sentence(listed: Any, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": listed}))
    with pytest.raises(DataError, match=complaint):
        load_rows(tmp_path)
