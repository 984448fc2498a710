"""The exported base says what the artefact's base and head say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from collm import CoLLM, DeferralHead, ModelSpec
from collm.cli.main import app
from collm.errors import ArtefactError, ConfigError, UnsupportedModel
from collm.models.language_model import LanguageModel
from collm.models.loading import load_model
from collm.vllm import NOTE
from collm.vllm.export import Note, defer_names, export_base
from tests.architectures import EXACT
from tests.engine.test_engine import random_head
from tests.tiny_models import make_model, tiny_config

IDS = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))


def biased_head(k: int = 1, size: int = 32) -> DeferralHead:
    head = random_head(size, k, scale=1.0)
    head.bias.data = torch.arange(1.0, k + 1) / 3
    return head


@torch.no_grad()
def check(out: Path, base: Any, head: DeferralHead, note: Note) -> None:
    exported = AutoModelForCausalLM.from_pretrained(out)
    given = exported(IDS).logits
    expected, hidden = base(IDS).logits, LanguageModel(base, name="base").hidden_states(IDS)
    rows = expected.shape[-1]
    assert given.shape[-1] == rows + head.num_assistants + 1 == exported.config.vocab_size
    tokens = note.vocab_size
    torch.testing.assert_close(given[..., :tokens], expected[..., :tokens], rtol=1e-5, atol=1e-5)
    assert (given[..., tokens:rows] == 0).all()
    logits = given[..., note.defer_ids] / note.scale + torch.tensor(note.biases)
    torch.testing.assert_close(logits, head(hidden), rtol=1e-5, atol=1e-5)
    assert (given[..., note.zero_id] == 0).all()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("padding", [0, 31], ids=["exact", "padded"])
@pytest.mark.parametrize("k", [1, 2])
def test_logits_and_defer_logits_stay(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tied: bool, padding: int, k: int
) -> None:
    base = make_model(tiny_config(tie_word_embeddings=tied, vocab_size=len(tokenizer) + padding), 0)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    head = biased_head(k)
    note = export_base(base, head, tokenizer, tmp_path / "out", default_threshold=0.4)
    check(tmp_path / "out", base, head, note)
    assert note == Note.read(tmp_path / "out")
    assert (note.vocab_size, note.default_threshold) == (len(tokenizer), 0.4)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    named = AutoTokenizer.from_pretrained(tmp_path / "out")
    names = ["<|defer|>"] if k == 1 else ["<|defer-1|>", "<|defer-2|>"]
    assert defer_names(head)[:-1] == names
    assert named.convert_tokens_to_ids(defer_names(head)) == [*note.defer_ids, note.zero_id]
    head.bias.data += 1
    assert named.convert_tokens_to_ids(defer_names(head)[-1]) == named.unk_token_id
    assert named("w5 w6")["input_ids"] == tokenizer("w5 w6")["input_ids"]
    assert named.decode([5, *note.defer_ids, note.zero_id], skip_special_tokens=True) == tokenizer.decode([5])


@pytest.mark.parametrize("name", sorted(EXACT))
def test_every_architecture_stays_itself_or_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    base = make_model(EXACT[name](), 0)
    language = LanguageModel(base, name="base")
    head = biased_head(size=language.hidden_size)
    if language.softcap is not None:
        with pytest.raises(UnsupportedModel, match="caps its logits"):
            export_base(base, head, tokenizer, tmp_path / "out")
        return
    check(tmp_path / "out", base, head, export_base(base, head, tokenizer, tmp_path / "out"))


def test_an_adapter_is_merged(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base: Any = get_peft_model(make_model(tiny_config(), 0), LoraConfig(target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    for name, weight in base.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    head = biased_head()
    note = export_base(base, head, tokenizer, tmp_path / "out")
    check(tmp_path / "out", base.eval(), head, note)
    assert not list((tmp_path / "out").glob("adapter*"))
    assert hasattr(base, "peft_config")


def test_the_command_exports_an_artefact(
    saved_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base, assistant = saved_model("base", 0), saved_model("assistant", 1)
    head = biased_head()
    CoLLM(ModelSpec(str(base)), [ModelSpec(str(assistant))], head, tokenizer).save_pretrained(tmp_path / "artefact")
    arguments = ["export", "vllm", str(tmp_path / "artefact"), str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "serve it with vLLM" in done.stdout
    check(tmp_path / "out", AutoModelForCausalLM.from_pretrained(base), head, Note.read(tmp_path / "out"))
    with pytest.raises(ArtefactError, match="out exists; choose another"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_what_no_row_can_hold_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="quantized"):
        export_base(ModelSpec("anywhere", quantization="nf4"), biased_head(), tokenizer, out)
    make_model(tiny_config(), 0).save_pretrained(tmp_path / "named" / "model")
    with pytest.raises(ConfigError, match="quantized"):
        export_base(
            load_model(ModelSpec(str(tmp_path / "named" / "model"), quantization="nf4")), biased_head(), tokenizer, out
        )
    for head, reason in (
        (DeferralHead(32, 2, predicts_gain=True), "takes the largest of the gains of 2 assistants"),
        (DeferralHead(32, width=8), "has a hidden layer of 8 units"),
        (DeferralHead(32, doubt=True), "reads the base's doubt"),
    ):
        with pytest.raises(UnsupportedModel, match=f"the head {reason}, so no rows .* can hold the head; decode with"):
            export_base(make_model(tiny_config(), 0), head, tokenizer, out)
    tokenizer.save_pretrained(tmp_path / "named")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "named")
    tokenizer.add_tokens(["<|defer|>"])
    with pytest.raises(UnsupportedModel, match=r"token '<\|defer\|>' already"):
        export_base(make_model(tiny_config(vocab_size=120), 0), biased_head(), tokenizer, out)
    assert list(tmp_path.iterdir()) == [tmp_path / "named"]


def test_a_failure_leaves_nothing_behind(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(Exception, match=r"No space left on device\. Its previous content is unchanged"):
        export_base(make_model(tiny_config(), 0), biased_head(), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "message"), [("{", "damaged"), ("{}", "damaged"), ('{"format": 9}', "format 9")])
def test_a_note_that_cannot_be_read_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ArtefactError, match="expected a directory that 'collm export vllm' wrote"):
        Note.read(tmp_path)
    (tmp_path / NOTE).write_text(content)
    with pytest.raises(ArtefactError, match=message):
        Note.read(tmp_path)
