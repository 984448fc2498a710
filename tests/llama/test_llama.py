"""GGUF files in llama.cpp: every token is that of a loop without a cache, over the same file and the same library."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams
from collm.artefact.manifest import CONFIG
from collm.cli.main import main
from collm.core.policies import Policy, SingleAuthorPolicy, ThresholdPolicy
from collm.engine.llama_runner import LlamaRunner
from collm.errors import ArtefactError, CacheFull, CollmError, ConfigError, LoadError, MismatchError, RequestError
from collm.models.gguf_export import write_gguf
from collm.models.llama import LlamaContext, LlamaModel, LlamaToken
from collm.models.loading import ModelSpec, load_model
from collm.models.members import load_author
from collm.run import RunConfig
from collm.run.forecast import forecast_run
from collm.tools.spec import ToolSpec
from collm.training.data import write_rows
from collm.training.examples import Example
from collm.training.scoring import read_scores
from tests.engine import test_runner
from tests.engine.slow import slow_decode
from tests.engine.test_engine import SHAPES, random_head
from tests.engine.test_exactness import RULES, Plans, plans, relative_of  # noqa: F401
from tests.tiny_models import make_model, tiny_config
from tests.two_tokenizers import two_tokenizers

pytestmark = pytest.mark.llama


class WholeText:
    """A file as the slow loop reads it: the whole text again at every call, in a new context."""

    device = torch.device("cpu")

    def __init__(self, spec: ModelSpec) -> None:
        self.model = LlamaModel(Path(spec.path), name="slow")

    def __call__(self, ids: torch.Tensor, **_: Any) -> Any:
        rows = [self.read(row) for row in ids.tolist()]
        logits, hidden = (torch.stack(each) for each in zip(*rows, strict=True))
        return SimpleNamespace(logits=logits, hidden_states=[hidden])

    def read(self, text: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        context = LlamaContext(self.model, positions=256)
        logits, hidden = context.decode([LlamaToken(0, at, one, True) for at, one in enumerate(text)], hidden=True)
        assert hidden is not None
        return logits, hidden


@pytest.fixture(scope="session")
def files(
    tmp_path_factory: pytest.TempPathFactory, byte_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], list[ModelSpec]]:
    """Specs of a base and two assistants that often agree with it, in one type."""
    folder = tmp_path_factory.mktemp("llama")
    models = [byte_model, *(relative_of(byte_model, byte_model.config, seed, 0.1 * seed) for seed in (1, 2))]

    def make(kind: str) -> list[ModelSpec]:
        paths = [folder / f"{number}-{kind}.gguf" for number in range(3)]
        for path, model in zip(paths, models, strict=True):
            if not path.exists():
                write_gguf(model, byte_tokenizer, path, kind)
        return [ModelSpec(str(path)) for path in paths]

    return make


@pytest.fixture
def trio(files: Callable[[str], list[ModelSpec]]) -> list[ModelSpec]:
    return files("f32")


def prompts_of(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    texts = ["the cat", "on", "the cat sat on the mat and the cat sat on the", "mat the cat sat on the mat, a cat"]
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize(("lookahead", "shape"), [(0, {}), (None, {}), *((None, shape) for shape in SHAPES)])
def test_float32_equals_the_slow_loop(
    lookahead: int | None, shape: dict[str, Any], trio: list[ModelSpec], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    base, assistant, _ = trio
    model = CoLLM(base, [assistant], random_head(32, 1, **shape), byte_tokenizer)
    slow, params = [WholeText(base), WholeText(assistant)], SamplingParams(max_tokens=24)
    prompts = prompts_of(byte_tokenizer)
    out = model.generate(prompts, params, threshold=0.5, max_batch=3, lookahead=lookahead)
    for prompt, completion in zip(prompts, out, strict=True):
        expected = slow_decode(
            slow,
            model.head,
            prompt,
            ThresholdPolicy(0.5),
            params,
            byte_tokenizer.eos_token_id,
            guess=completion.token_ids,
        )
        assert (completion.token_ids, completion.authors) == expected
    assert {author for completion in out for author in completion.authors} == {0, 1}


def test_a_forecast_times_files_and_asks_tools(trio: list[ModelSpec], tmp_path: Path) -> None:
    rows = [{"prompt": f"the {word} has {i} + {i} =", "completion": f" {2 * i}"} for i, word in enumerate(["cat"] * 9)]
    write_rows(tmp_path / "rows.jsonl", rows)
    options: dict[str, Any] = {"calibrate": False, "cache_hidden_states": True}
    paths = [trio[1].path, "tool:calculator"]
    config = RunConfig(base=trio[0].path, assistant=paths, data=str(tmp_path / "rows.jsonl"), **options)
    found = forecast_run(config, rows=9, max_length=64, clip=8.0)
    assert [one.pass_ms is None for one in found.authors] == [False, False, True]
    assert found.authors[2].agreement[2] > 0
    assert found.points[0].tokens_per_s is not None
    assert {"doubt", "random"} <= {*found.minus}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", RULES, ids=lambda policy: type(policy).__name__)
def test_every_rule_equals_the_slow_loop(
    policy: Policy,
    temperature: float,
    trio: list[ModelSpec],
    byte_tokenizer: PreTrainedTokenizerFast,
    plans: Plans,  # noqa: F811
) -> None:
    model = CoLLM(trio[0], trio[1:], random_head(32, 2), byte_tokenizer)
    slow, prompts = [WholeText(spec) for spec in trio], prompts_of(byte_tokenizer)[:3]
    seeds = [None] * 3 if not temperature and not policy.draws else [3, 4, 5]
    params = [SamplingParams(max_tokens=16, temperature=temperature, seed=seed) for seed in seeds]
    out = model.generate(prompts, params, policy=policy, max_batch=2)
    for prompt, one, completion in zip(prompts, params, out, strict=True):
        eos = byte_tokenizer.eos_token_id
        expected = slow_decode(slow, model.head, prompt, policy, one, eos, guess=completion.token_ids)
        assert (completion.token_ids, completion.authors) == expected


@pytest.mark.parametrize(("kind", "atol"), [("f32", 2e-4), ("q8_0", 0.3)])
def test_random_schedules_of_slots_equal_a_loop_without_a_cache(
    kind: str, atol: float, files: Callable[[str], list[ModelSpec]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = files(kind)[0]
    monkeypatch.setattr(
        "tests.engine.test_runner.plain_rows", lambda model, texts: torch.stack([model.read(t)[0][-1] for t in texts])
    )
    runner = LlamaRunner(LlamaModel(Path(spec.path), name="model"))
    for seed in range(3):
        assert test_runner.play_schedule(WholeText(spec), runner, seed=seed, steps=30, atol=atol) > 20  # type: ignore[arg-type]
        for slot in range(len(runner._texts)):
            if slot not in runner._closed:
                runner.close(slot)


def test_quantized_weights_give_the_same_tokens_in_the_same_shapes(
    files: Callable[[str], list[ModelSpec]], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The prompt in one call, then a token at a time: as our loop does without drafts."""
    spec, prompt = files("q8_0")[0], prompts_of(byte_tokenizer)[2]
    model = CoLLM(spec, [spec], random_head(32, 1), byte_tokenizer)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    out = model.generate(prompt, params, policy=SingleAuthorPolicy(0), lookahead=0)
    context, text = LlamaContext(LlamaModel(Path(spec.path), name="slow"), positions=256), list(prompt)
    logits, _ = context.decode([LlamaToken(0, at, one, True) for at, one in enumerate(text)], hidden=True)
    for _ in range(20):
        text.append(int(logits[-1].argmax()))
        logits, _ = context.decode([LlamaToken(0, len(text) - 1, text[-1], True)], hidden=True)
    assert out[0].token_ids == text[len(prompt) :]


def test_it_is_the_model_that_transformers_dequantizes(trio: list[ModelSpec]) -> None:
    text = list(range(20, 60))
    slow = WholeText(trio[0])
    logits, hidden = slow.read(text)
    with torch.no_grad():
        expected = load_model(trio[0].dequantized())(torch.tensor([text]), output_hidden_states=True)
    torch.testing.assert_close(logits, expected.logits[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(hidden, expected.hidden_states[-1][0], atol=1e-3, rtol=1e-3)
    assert slow.model.weights_per_token > 0


@pytest.mark.parametrize("gguf_base", [True, False])
def test_mixed_pairs(gguf_base: bool, trio: list[ModelSpec], byte_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = [load_model(spec.dequantized()) for spec in trio[:2]]
    members: list[Any] = [trio[0], plain[1]] if gguf_base else [plain[0], trio[1]]
    mixed = CoLLM(members[0], members[1:], random_head(32, 1), byte_tokenizer)
    same = CoLLM(plain[0], plain[1:], mixed.head, byte_tokenizer)
    params, prompts = SamplingParams(max_tokens=16), prompts_of(byte_tokenizer)
    found, expected = (one.generate(prompts, params, threshold=0.5) for one in (mixed, same))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_a_prefix_is_shared_and_a_full_cache_preempts(
    trio: list[ModelSpec], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = prompts_of(byte_tokenizer)[3]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    wide = CoLLM(trio[0], trio[1:2], random_head(32, 1), byte_tokenizer)
    out = wide.generate([prompt] * 3, params, threshold=0.5)
    assert out.usage["base"].tokens_read < 3 * (len(prompt) + 24)
    # room for two of three sequences
    size = wide.runners[0].bytes_per_position + wide.runners[1].bytes_per_position  # type: ignore[union-attr]
    narrow = CoLLM(trio[0], trio[1:2], wide.head, byte_tokenizer, cache_memory=256 * size)
    tight = narrow.generate([prompt] * 3, params, threshold=0.5)
    assert [one.token_ids for one in tight] == [one.token_ids for one in out]


def test_what_was_refused_changes_nothing(trio: list[ModelSpec]) -> None:
    model = LlamaModel(Path(trio[0].path), name="base")
    runner = LlamaRunner(model, cache_memory=64 * model.bytes_per_position)
    slot = runner.open()
    before = runner.extend({slot: [5, 6, 7]}).logits
    with pytest.raises(CacheFull, match="holds 64 tokens"):
        runner.extend({slot: [8] * 100})
    with pytest.raises(RequestError, match="reads at most 128 tokens"):
        runner.extend({slot: [8] * 200})
    assert runner.length(slot) == 3
    runner.rollback(slot, 2)
    torch.testing.assert_close(runner.extend({slot: [7]}).logits, before, atol=1e-5, rtol=1e-5)


def test_scores_and_hidden_states_are_those_that_decode(
    trio: list[ModelSpec], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [[5 + i for i in range(40)], [60 - i for i in range(23)]]
    examples = [Example(text, [False] * 4 + [True] * (len(text) - 4)) for text in texts]
    author = load_author(trio[0], name="base", vocab_size=len(byte_tokenizer))
    found = read_scores(author, examples, hidden_states=True)
    plain = load_author(trio[0].dequantized(), name="base", vocab_size=len(byte_tokenizer))
    expected = read_scores(plain, examples, hidden_states=True)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["logprob"], expected["logprob"], atol=1e-3, rtol=1e-3)
    for name in ("hidden", "doubt"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=1e-3)
    assert torch.equal(found["correct"], expected["correct"])


def test_a_head_is_trained_calibrated_and_served_on_the_file(
    files: Callable[[str], list[ModelSpec]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def collm(*command: str) -> str:
        monkeypatch.setattr("sys.argv", ["collm", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    base, assistant, _ = files("q8_0")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"the {i}", "completion": f"cat {i} sat"}) + "\n" for i in range(40)))
    own = tmp_path / "base.gguf"
    own.write_bytes(Path(base.path).read_bytes())
    models = ["--base", str(own), "--assistant", assistant.path, "--method", "head"]
    options = ["--max_tokens", "8", "--use_cpu", "true", "--warm_start", "false"]
    collm("train", *models, "--data", str(rows), "--output_dir", str(tmp_path / "run"), *options)
    artefact = tmp_path / "run" / "collaboration"
    manifest = json.loads((artefact / CONFIG).read_text())
    assert manifest["base"]["dtype"] == "auto"
    assert manifest["weights"] == ModelSpec(str(own)).identity()["weights"]
    model = CoLLM.from_pretrained(artefact)
    assert isinstance(model.members[0], LlamaModel)
    text = model.generate("the 3", SamplingParams(max_tokens=8), threshold=0.5)[0].text
    assert text in collm("generate", str(artefact), "the 3", "--max_tokens", "8", "--threshold", "0.5")
    in_transformers = CoLLM.from_pretrained(artefact, engine="transformers")
    assert not any(isinstance(one, LlamaModel) for one in in_transformers.members)
    content = bytearray(own.read_bytes())
    content[-64:] = bytes(64)
    own.write_bytes(content)
    with pytest.raises(ArtefactError, match="has a head for"):
        CoLLM.from_pretrained(artefact)


def test_tools_and_other_tokenizers(
    trio: list[ModelSpec], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with_tool = CoLLM(trio[0], [ToolSpec.parse("tool:calculator")], random_head(32, 1), byte_tokenizer)
    out = with_tool.generate("12 + 30 =", SamplingParams(max_tokens=4), threshold=-1.0)
    assert 1 in out[0].authors
    other = two_tokenizers()[1]

    config = tiny_config(
        intermediate_size=64, vocab_size=len(other), eos_token_id=other.eos_token_id, pad_token_id=None
    )
    write_gguf(make_model(config, seed=5), other, tmp_path / "other.gguf", "f32")
    spec = ModelSpec(str(tmp_path / "other.gguf"))
    mixed = CoLLM(trio[0], [spec], random_head(32, 1), byte_tokenizer)
    plain = CoLLM(
        load_model(trio[0].dequantized()),
        [load_model(spec.dequantized())],
        mixed.head,
        byte_tokenizer,
        tokenizers=[other],
    )
    params = SamplingParams(max_tokens=16)
    found, expected = (one.generate("the cat", params, threshold=0.5)[0] for one in (mixed, plain))
    assert (found.token_ids, found.authors) == (expected.token_ids, expected.authors)


# Refusals


def test_a_damaged_file_is_refused(trio: list[ModelSpec], tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(Path(trio[0].path).read_bytes()[:-100])
    with pytest.raises(LoadError, match=r"llama\.cpp cannot load .*short\.gguf"):
        LlamaModel(short, name="base")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(LoadError, match=r"llama\.cpp cannot load .*text\.gguf"):
        LlamaModel(tmp_path / "text.gguf", name="base")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention": "eager"}, ConfigError, "has no effect on"),
        ({"quantization": "nf4"}, ConfigError, "which collm cannot quantize"),
    ],
)
def test_options_without_effect_are_refused(
    options: dict[str, Any], error: type[CollmError], message: str, trio: list[ModelSpec]
) -> None:
    with pytest.raises(error, match=message):
        ModelSpec(trio[0].path, **options)


def test_a_tokenizer_of_another_file_is_refused(trio: list[ModelSpec], byte_tokenizer: PreTrainedTokenizerFast) -> None:
    other = two_tokenizers()[0]
    model = CoLLM(trio[0], [ToolSpec.parse("tool:calculator")], DeferralHead(32), other)
    with pytest.raises(MismatchError, match="token"):
        model.generate("the cat", threshold=0.5)


def test_a_cache_that_is_too_small_is_refused_before_any_work(
    trio: list[ModelSpec], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = CoLLM(trio[0], trio[1:2], DeferralHead(32), byte_tokenizer, cache_memory="1KiB")
    with pytest.raises(ConfigError, match="raise cache_memory"):
        model.generate("the cat", threshold=0.5)
