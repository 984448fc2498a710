"""Scores equal the model's own loss, and a killed run ends with the same bytes as an undisturbed one."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from collm.core.head import doubt_of
from collm.errors import ArtefactError, ConfigError, MismatchError, ModelFailure, WriteError
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec, load_model
from collm.training import scoring
from collm.training.examples import Example, Examples
from collm.training.scores import Scores, find_scores, load_scores
from collm.training.scoring import progress_bar, read_scores, write_scores
from tests.training.conftest import Saved, Tiny, random_examples, score_examples

SPEC = ModelSpec("some/model")
EXAMPLES = random_examples(23)


def run(
    module: PreTrainedModel, out: Path, examples: Examples = EXAMPLES, spec: ModelSpec = SPEC, **changes: Any
) -> Scores:
    options = {"max_batch_tokens": 64, "shard_size": 5, **changes}
    return score_examples(LanguageModel(module, name="model"), examples, out, spec=spec, **options)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_doubt_is_stored_with_the_hidden_states(tiny_model: Tiny, tmp_path: Path) -> None:
    module = tiny_model(1)
    scores = run(module, tmp_path, hidden_states=True)
    assert scores.hidden is not None
    assert scores.doubt is not None
    for index, example in enumerate(EXAMPLES):
        with torch.no_grad():
            logits = module(torch.tensor([example.token_ids])).logits[0, :-1]
        own = slice(scores.offsets[index], scores.offsets[index + 1])
        expected = doubt_of(logits[example.is_target[1:]])
        torch.testing.assert_close(scores.doubt[own], expected, rtol=1e-4, atol=1e-5)
    assert run(module, tmp_path / "plain").doubt is None


@pytest.mark.slow
@pytest.mark.parametrize("max_batch_tokens", [1, 64, 4096])
def test_scores_equal_the_shifted_cross_entropy_of_the_model(
    tiny_model: Tiny, tmp_path: Path, max_batch_tokens: int
) -> None:
    module = tiny_model(1)
    scores = run(module, tmp_path, max_batch_tokens=max_batch_tokens)
    total = 0.0
    for index, example in enumerate(EXAMPLES):
        ids = torch.tensor([example.token_ids])
        with torch.no_grad():
            logits = module(ids).logits[0]
        rows = [t for t in range(len(example.token_ids) - 1) if example.is_target[t + 1]]
        gold = [example.token_ids[t + 1] for t in rows]
        torch.testing.assert_close(
            scores.logprob(index), logits[rows].log_softmax(-1)[range(len(rows)), gold], rtol=1e-4, atol=1e-5
        )
        assert scores.predicted is not None
        predicted = scores.predicted[scores.offsets[index] : scores.offsets[index + 1]]
        assert predicted.tolist() == logits[rows].argmax(-1).tolist()
        assert scores.correct(index).tolist() == [int(logits[t].argmax()) == g for t, g in zip(rows, gold, strict=True)]
        labels = torch.tensor([[i if hit else -100 for i, hit in zip(ids[0], example.is_target, strict=True)]])
        total += module(ids, labels=labels).loss.item() * len(rows)
    assert len(scores.logprobs) == sum(example.num_targets for example in EXAMPLES)
    assert -scores.logprobs.mean().item() == pytest.approx(total / len(scores.logprobs), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batches_before_the_kill", [1, 3, 5])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    tiny_model: Tiny, tmp_path: Path, batches_before_the_kill: int
) -> None:
    module = tiny_model(1)
    undisturbed = run(module, tmp_path / "whole")
    calls = []

    def kill(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == batches_before_the_kill:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(module, tmp_path / "killed", progress=kill)
    assert set(content(tmp_path / "killed")) < set(content(tmp_path / "whole"))
    assert find_scores(tmp_path / "killed", EXAMPLES, SPEC) is None
    with pytest.raises(ArtefactError, match="incomplete"):
        load_scores(tmp_path / "killed", EXAMPLES)
    resumed = run(module, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert torch.equal(resumed.logprobs, undisturbed.logprobs)


def test_whole_shards_are_not_scored_again(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_model(1)
    first = run(module, tmp_path)
    monkeypatch.setattr(LanguageModel, "hidden_states", lambda *_, **__: pytest.fail("scored again"))
    reported: list[tuple[int, int]] = []
    again = run(module, tmp_path, progress=lambda done, total: reported.append((done, total)))
    loaded = load_scores(tmp_path, EXAMPLES, SPEC)
    total = sum(len(example.token_ids) - 1 for example in EXAMPLES)
    assert reported[-1] == (total, total)
    for scores in (again, loaded):
        assert torch.equal(scores.logprobs, first.logprobs)
        assert torch.equal(scores.corrects, first.corrects)


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign"])
def test_a_damaged_shard_is_noticed_and_computed_again(tiny_model: Tiny, tmp_path: Path, damage: str) -> None:
    module = tiny_model(1)
    run(module, tmp_path / "scores")
    before = content(tmp_path / "scores")
    shard = tmp_path / "scores" / "scores-00002.safetensors"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-3])
    elif damage == "flip":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    else:
        run(tiny_model(2), tmp_path / "other", spec=ModelSpec("other/model"))
        shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    with pytest.raises(ArtefactError, match="damaged"):
        load_scores(tmp_path / "scores", EXAMPLES)
    run(module, tmp_path / "scores")
    assert content(tmp_path / "scores") == before


def test_scores_of_something_else_are_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    module = tiny_model(1)
    run(module, tmp_path)
    before = content(tmp_path)
    attempts: list[tuple[str, dict[str, Any]]] = [
        ("another input .*fingerprint", {"examples": random_examples(23, seed=1)}),
        ("another model: path is 'some/model', now 'another/model'", {"spec": ModelSpec("another/model")}),
        ("another model revision", {"spec": ModelSpec("some/model", revision="v2")}),
        ("another model dtype", {"spec": ModelSpec("some/model", dtype="float32")}),
        ("another shard size", {"shard_size": 6}),
    ]
    for complaint, changes in attempts:
        with pytest.raises(ConfigError, match=f"{complaint}.*choose another directory, or delete that one"):
            run(module, tmp_path, **changes)
    with pytest.raises(ConfigError, match="another vocabulary size"):
        run(tiny_model(1, vocab_size=98), tmp_path)
    with pytest.raises(ConfigError, match="another input"):
        load_scores(tmp_path, random_examples(22))
    assert content(tmp_path) == before


def test_a_model_trained_anew_at_the_same_path_is_another_model(saved_model: Saved) -> None:
    directory = saved_model("model", 1)
    out = directory.parent / "scores"
    spec = ModelSpec(str(directory), device="cpu")
    run(load_model(spec), out, spec=spec)
    saved_model("model", 2)
    with pytest.raises(ConfigError, match="another weights of the model"):
        find_scores(out, EXAMPLES, spec)


def test_missing_or_damaged_headers_are_said(tiny_model: Tiny, tmp_path: Path) -> None:
    assert find_scores(tmp_path, EXAMPLES) is None
    with pytest.raises(ArtefactError, match="no scores in"):
        load_scores(tmp_path, EXAMPLES)
    run(tiny_model(1), tmp_path)
    header = tmp_path / "scores.json"
    for damaged in (header.read_text()[:-9], "{}", json.dumps({"format": 99})):
        header.write_text(damaged)
        with pytest.raises(ArtefactError, match=r"scores\.json"):
            load_scores(tmp_path, EXAMPLES)


def test_a_model_that_raises_is_named(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny_model(0), name="assistant")

    def raises(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "hidden_states", raises)
    with pytest.raises(ModelFailure, match="assistant raised OutOfMemoryError while it read 1 examples at once: CUDA"):
        read_scores(model, [Example([5, 6, 7], [False, True, True])])


def test_nan_names_the_model_and_the_example(tiny_model: Tiny, tmp_path: Path) -> None:
    module = tiny_model(1)
    with torch.no_grad():
        module.model.embed_tokens.weight[EXAMPLES[11].token_ids[0]] = torch.nan
    broken = {i for i, one in enumerate(EXAMPLES) if EXAMPLES[11].token_ids[0] in one.token_ids[:-1]}
    with pytest.raises(ModelFailure, match="model returned NaN logits for example") as caught:
        run(module, tmp_path)
    assert any(f"for example {index} " in str(caught.value) for index in broken)


def test_examples_the_model_cannot_read_are_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"example \d+ has \d+ tokens to read, but model reads at most 10"):
        run(tiny_model(1, max_position_embeddings=10), tmp_path)
    with pytest.raises(MismatchError, match="has ids below 50"):
        run(tiny_model(1, vocab_size=50), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_whole_shards_only(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny_model(1)
    run(module, tmp_path / "whole")
    write_bytes = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "scores-00001" in self.name:
            write_bytes(self, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(WriteError, match=r"scores-00001.*No space left"):
            run(module, tmp_path / "full")
    assert sorted(content(tmp_path / "full")) == ["scores-00000.safetensors", "scores.json"]
    run(module, tmp_path / "full")
    assert content(tmp_path / "full") == content(tmp_path / "whole")


def test_the_model_is_left_in_its_mode(tiny_model: Tiny, tmp_path: Path) -> None:
    module = tiny_model(1, attention_dropout=0.5).train()
    trained = run(module, tmp_path / "a")
    assert module.training
    assert torch.equal(trained.logprobs, run(module.eval(), tmp_path / "b").logprobs)


def test_shards_are_plain_safetensors(tiny_model: Tiny, tmp_path: Path) -> None:
    run(tiny_model(1), tmp_path)
    tensors = load_file(tmp_path / "scores-00000.safetensors")
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "logprob": torch.float32,
        "correct": torch.uint8,
        "predicted": torch.int32,
        "offsets": torch.int64,
        "examples": torch.int64,
    }
    save_file(tensors, tmp_path / "scores-00000.safetensors")
    with pytest.raises(ArtefactError):
        load_scores(tmp_path, EXAMPLES)


def test_the_progress_bar_is_silent_where_not_enabled(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("scoring", enabled=False) as progress:
        progress(1, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_is_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with progress_bar("scoring with \x1bmine", "texts") as progress:
        for done in range(0, 5001, 5):
            now = 100 + done / 100
            progress(done, 5000)
        progress(5000, 5000)
    assert capsys.readouterr().err.splitlines() == [
        "scoring with <1b>mine: 0 of 5,000 texts",
        "scoring with <1b>mine: 1,000 of 5,000 texts, about 0:00:40 left",
        "scoring with <1b>mine: 2,000 of 5,000 texts, about 0:00:30 left",
        "scoring with <1b>mine: 3,000 of 5,000 texts, about 0:00:20 left",
        "scoring with <1b>mine: 4,000 of 5,000 texts, about 0:00:10 left",
        "scoring with <1b>mine: 5,000 of 5,000 texts",
    ]


def test_progress_is_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with progress_bar("[scoring]", "texts") as progress:
        progress(1200, 4000)
    shown = capsys.readouterr().err
    assert "[scoring] " in shown
    assert "━" in shown
    assert "1,200 of 4,000 texts" in shown


def test_processes_share_the_shards(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny_model(2), name="model")
    whole = score_examples(model, EXAMPLES, tmp_path / "whole", spec=SPEC, shard_size=4)
    monkeypatch.setattr(scoring, "SHARD_SIZE", 4)
    for process in (1, 0):
        assert find_scores(tmp_path / "shared", EXAMPLES, SPEC) is None
        write_scores(model, EXAMPLES, tmp_path / "shared", spec=SPEC, share=(process, 2))
    shards = sorted(path.name for path in (tmp_path / "shared").iterdir())
    assert shards == sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(shards) > 4
    for name in shards[1:]:
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert torch.equal(load_scores(tmp_path / "shared", EXAMPLES).logprobs, whole.logprobs)


def test_a_directory_tells_its_own_examples(tiny_model: Tiny, tmp_path: Path) -> None:
    scores, loaded = run(tiny_model(1), tmp_path), load_scores(tmp_path)
    for name in ("logprobs", "corrects", "offsets"):
        assert torch.equal(getattr(loaded, name), getattr(scores, name))
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[2].write_bytes(shards[1].read_bytes())
    with pytest.raises(ArtefactError, match="damaged: the shards hold other examples"):
        load_scores(tmp_path)
    shards[1].unlink()
    with pytest.raises(ArtefactError, match=f"incomplete: {shards[1].name} is missing"):
        load_scores(tmp_path)
