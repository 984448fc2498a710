"""A collaboration in lm-evaluation-harness: its numbers are ours, and those of its own model where nobody defers."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import Registry
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, ModelSpec, SamplingParams, ToolSpec
from collm.cli.main import main
from collm.core.head import defer_probs
from collm.core.objective import marginal_logprobs
from collm.core.policies import ThresholdPolicy
from collm.errors import ConfigError, MissingExtra, ModelFailure, RequestError
from collm.evaluation import harness
from collm.evaluation.compare import Evaluation, compare
from collm.evaluation.harness import HarnessLM, model_arguments, sampling_params
from collm.evaluation.systems import systems_named
from collm.evaluation.tasks import task_named
from collm.models.language_model import LanguageModel
from collm.models.tools import ToolModel
from collm.tools.calls import in_process
from collm.training.examples import aligned_example
from collm.training.scoring import read_scores
from tests.tiny_models import make_model, tiny_config
from tests.two_tokenizers import two_tokenizers, writing_model

THRESHOLD = 0.5
PAIRS = [
    ("w1 w2 w3", " w4 w5"),
    ("w7", " w8"),
    ("", "w9 w10 w11"),
    ("w12 w13 w14 w15 w16 ", "w17"),
    ("w3", " w4 w5 w6"),
]
TEXTS = [" ".join(f"w{(3 * i + n) % 90}" for i in range(length)) for n, length in enumerate([5, 40, 1, 17])]


class World(NamedTuple):
    """Two models on disk and collaborations of them: one that defers about half of the time, one that never does."""

    base: Path
    sharing: Path
    alone: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> World:
    folder = tmp_path_factory.mktemp("world")
    specs = []
    for seed, changes in enumerate([{}, {"hidden_size": 48}, {}]):
        make_model(tiny_config(**changes), seed).save_pretrained(folder / f"model-{seed}")
        tokenizer.save_pretrained(folder / f"model-{seed}")
        specs.append(ModelSpec(str(folder / f"model-{seed}")))
    sharing, never = DeferralHead(32, 2), DeferralHead(32, 2)
    with torch.no_grad():
        sharing.weight.normal_(generator=torch.Generator().manual_seed(3))
        never.bias.fill_(-1e4)
    for name, head in (("sharing", sharing), ("alone", never)):
        CoLLM(specs[0], specs[1:], head, tokenizer).save_pretrained(folder / name)
    return World(folder / "model-0", folder / "sharing", folder / "alone")


@pytest.fixture(scope="module")
def model(world: World) -> CoLLM:
    return CoLLM.from_pretrained(world.sharing)


def asked(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


@torch.no_grad()
def read_slowly(model: CoLLM, context: list[int], continuation: list[int]) -> tuple[list[float], list[bool]]:
    """Per token the joint log-probability and whether greedy decoding writes it; every model reads from scratch."""
    logprobs, written = [], []
    for place in range(len(continuation)):
        text, gold = torch.tensor([context + continuation[:place]]), continuation[place]
        logits = [member.module(text).logits[0, -1].float() for member in model.members]
        u = model.head(model.members[0].module.model(text).last_hidden_state[0, -1])  # (K,)
        each = torch.stack([one.log_softmax(-1)[gold] for one in logits])
        logprobs.append(float(marginal_logprobs(each[0], each[1:], u)))
        author = 0 if float(defer_probs(u)) <= THRESHOLD else 1 + int(u.argmax())
        written.append(int(logits[author].argmax()) == gold)
    return logprobs, written


def encoded(model: CoLLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Words are tokens, so the tokens of the parts are those of the whole; without a context EOS stands before."""
    read = lambda text: model.tokenizer(text)["input_ids"]  # noqa: E731
    return read(context) or [model.tokenizer.eos_token_id], read(continuation)


# Likelihoods


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, "2", "auto"])
def test_likelihoods_are_those_of_the_joint_model_read_token_by_token(model: CoLLM, batch_size: Any) -> None:
    pairs = [*PAIRS]
    for context in ("w1 w2 w3", "w20"):
        said = model.generate(context, SamplingParams(max_tokens=4), threshold=THRESHOLD)[0].text
        pairs += [(context, " " + said.strip()), (context, " " + said.strip().rsplit(" ", 1)[0] + " w0")]
    found = HarnessLM(model, threshold=THRESHOLD, batch_size=batch_size).loglikelihood(
        asked("loglikelihood", pairs), disable_tqdm=True
    )
    for (logprob, greedy), pair in zip(found, pairs, strict=True):
        logprobs, written = read_slowly(model, *encoded(model, *pair))
        assert logprob == pytest.approx(sum(logprobs), abs=1e-4)
        assert greedy == all(written)
    assert [greedy for _, greedy in found[-4:]] == [True, False, True, False]
    deferred = model.generate("w1 w2 w3", SamplingParams(max_tokens=4), threshold=THRESHOLD)[0].authors
    assert set(deferred) != {0}


@pytest.mark.slow
def test_the_threshold_moves_what_is_greedy_and_no_likelihood(model: CoLLM) -> None:
    said = model.generate("w1 w2 w3", SamplingParams(max_tokens=4), threshold=1.0)[0]
    requests = asked("loglikelihood", [("w1 w2 w3", " " + said.text.strip())])
    alone, never = (
        HarnessLM(model, threshold=one).loglikelihood(requests, disable_tqdm=True)[0] for one in (1.0, -1.0)
    )
    assert alone[0] == never[0]
    assert (alone[1], never[1]) == (True, False)


@pytest.mark.slow
def test_rolling_likelihoods_predict_every_token_once(model: CoLLM) -> None:
    eos = model.tokenizer.eos_token_id
    (whole, cut) = (
        HarnessLM(model, threshold=THRESHOLD, batch_size=3, max_length=length).loglikelihood_rolling(
            asked("loglikelihood_rolling", [(text,) for text in TEXTS]), disable_tqdm=True
        )
        for length in (None, 8)
    )
    for place, text in enumerate(TEXTS):
        ids = model.tokenizer(text)["input_ids"]
        assert whole[place] == pytest.approx(sum(read_slowly(model, [eos], ids)[0]), abs=1e-3)
        text_ids, total = [eos, *ids], 0.0
        for done in range(0, len(ids), 8):  # a window is full but for the first; what it predicts again is not counted
            end = min(done + 8, len(ids))
            total += sum(read_slowly(model, text_ids[max(end - 8, 0) : done + 1], ids[done:end])[0])
        assert cut[place] == pytest.approx(total, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [None, 8])
def test_a_head_that_never_defers_leaves_the_numbers_of_the_harness_own_model(
    world: World, max_length: int | None
) -> None:
    ours = HarnessLM(CoLLM.from_pretrained(world.alone), threshold=THRESHOLD, batch_size=2, max_length=max_length)
    theirs = HFLM(str(world.base), device="cpu", batch_size=2, max_length=max_length)
    pairs = asked("loglikelihood", [*PAIRS, (TEXTS[1], " w5 w6")])
    for (logprob, greedy), (expected, expected_greedy) in zip(
        ours.loglikelihood(pairs, disable_tqdm=True), theirs.loglikelihood(pairs, disable_tqdm=True), strict=True
    ):
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy
    texts = asked("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert ours.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-4
    )
    generations = asked("generate_until", [(text, {"until": ["w5"], "max_gen_toks": 5}) for text in TEXTS])
    assert [text.strip() for text in ours.generate_until(generations, disable_tqdm=True)] == [
        text.strip() for text in theirs.generate_until(generations, disable_tqdm=True)
    ]


def test_a_tool_counts_as_what_it_would_write(tokenizer: PreTrainedTokenizerFast, monkeypatch: Any) -> None:
    def knows(text: str) -> str | None:
        word = text.rsplit(" ", 1)[-1]
        known = word[:1] == "w" and word[1:].isdigit() and int(word[1:]) % 3 < 2
        return f" w{int(word[1:]) * 7 % 89}" if known else None

    monkeypatch.setattr("collm.models.tools.open_tool", lambda spec: in_process(knows))
    model = CoLLM(make_model(tiny_config(), 0), [ToolSpec("calculator", eps=0.05)], DeferralHead(32), tokenizer)
    lm = HarnessLM(model, threshold=0.4)  # a new head gives every author even odds: the tool is always asked
    said = model.generate("w1 w3", SamplingParams(max_tokens=5), threshold=0.4)[0]
    assert set(said.authors) == {0, 1}
    context = tokenizer("w1 w3")["input_ids"]
    wrong = [*said.token_ids[:-1], (said.token_ids[-1] + 1) % 97]
    found = lm._loglikelihood_tokens([("", context, said.token_ids), ("", context, wrong)], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]
    base, tool = model.members
    assert isinstance(tool, ToolModel)
    text = torch.tensor([context + said.token_ids])
    with torch.no_grad():
        by_base = base.module(text).logits[0, 1:-1].log_softmax(-1).gather(-1, text[0, 2:, None]).squeeze(-1)
    read = [tool.next_tokens(text[0].tolist(), [place])[0] for place in range(2, 7)]
    hit, miss, _ = tool.logprobs
    by_tool = torch.tensor([hit if one == gold else miss for one, gold in zip(read, said.token_ids, strict=True)])
    by_tool = torch.where(torch.tensor([one is None for one in read]), by_base, by_tool)
    assert found[0][0] == pytest.approx(float(marginal_logprobs(by_base, by_tool[:, None], torch.zeros(5, 1)).sum()))


def test_a_failing_model_stops_the_run(world: World) -> None:
    model = CoLLM.from_pretrained(world.sharing)
    model.members[2].module.get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(ModelFailure, match="assistant-2 returned NaN"):
        HarnessLM(model, threshold=THRESHOLD).loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)


@pytest.mark.slow
def test_the_cache_of_the_harness_keeps_what_was_done(model: CoLLM, tmp_path: Path, monkeypatch: Any) -> None:
    requests = {
        "loglikelihood": asked("loglikelihood", PAIRS),
        "loglikelihood_rolling": asked("loglikelihood_rolling", [(text,) for text in TEXTS]),
        "generate_until": asked("generate_until", [(text, {"until": [], "max_gen_toks": 3}) for text in TEXTS]),
    }
    lm = HarnessLM(model, threshold=THRESHOLD, batch_size=2)
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    whole = {name: getattr(HarnessLM(model, threshold=THRESHOLD), name)(each) for name, each in requests.items()}
    read, passes = harness.gold_views, []

    def dying(*arguments: Any) -> Any:
        passes.append(len(arguments[1]))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(harness, "gold_views", dying)
    with pytest.raises(KeyboardInterrupt):
        cached.loglikelihood(requests["loglikelihood"])
    for name, each in requests.items():
        assert getattr(cached, name)(each) == [pytest.approx(one) for one in whole[name]], name
    assert passes[:4] == [2, 2, 1, 1]  # after the interruption only what was left
    monkeypatch.setattr(harness, "gold_views", lambda *_: pytest.fail("scored again"))
    monkeypatch.setattr(CoLLM, "generate", lambda *_, **__: pytest.fail("generated again"))
    for name, each in requests.items():
        assert getattr(cached, name)(each) == [pytest.approx(one) for one in whole[name]], name
    cached.dbdict.close()


def test_tokens_that_do_not_fit(model: CoLLM) -> None:
    lm = HarnessLM(model, threshold=THRESHOLD, max_length=4)
    pairs = [("w9 w1 w2 w3", " w4"), ("w5 w6 w7 w8 w9 w1 w2 w3", " w4")]
    short, long = (lm.loglikelihood(asked("loglikelihood", [pair]), disable_tqdm=True) for pair in pairs)
    assert short == long
    with pytest.raises(RequestError, match="a continuation has 5 tokens, expected 1 to 4"):
        lm.loglikelihood(asked("loglikelihood", [("w1", " w1 w2 w3 w4 w5")]), disable_tqdm=True)


# Generation


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, "auto"])
def test_generations_are_those_of_generate(model: CoLLM, batch_size: Any) -> None:
    prompts = ["w1 w2 w3", "w20", "", "w5 " * 30]
    until = model.generate("w1 w2 w3", SamplingParams(max_tokens=8), threshold=THRESHOLD)[0].text.split()[4]
    options: list[dict[str, Any]] = [{"until": [until], "max_gen_toks": 8}, {"until": "w", "max_gen_toks": 3}]
    params = [SamplingParams(8, stop=[until]), SamplingParams(3, stop=["w"])]
    lm = HarnessLM(model, threshold=THRESHOLD, batch_size=batch_size)
    found = lm.generate_until(asked("generate_until", [(p, o) for p in prompts for o in options]), disable_tqdm=True)
    eos = [model.tokenizer.eos_token_id]
    expected = model.generate([p or eos for p in prompts for _ in options], params * 4, threshold=THRESHOLD)
    assert found == [one.text for one in expected]
    assert "stop" in {one.finish_reason for one in expected}


def test_draws_follow_the_seed_of_the_harness(model: CoLLM) -> None:
    options = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 40}
    requests = asked("generate_until", [("w1 w2", options)] * 2)
    lm = HarnessLM(model, policy="joint", batch_size=2)
    found = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        found.append(lm.generate_until(requests, disable_tqdm=True))
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]
    params = SamplingParams(6, temperature=1.5, top_p=0.9, top_k=40, seed=7)
    assert found[0] == [one.text for one in model.generate(["w1 w2"] * 2, params, policy="joint")]


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({}, SamplingParams(256)),
        ({"until": "\n", "max_new_tokens": 3, "do_sample": False, "temperature": 1}, SamplingParams(3, stop=["\n"])),
        ({"temperature": 0.5, "num_beams": 1}, SamplingParams(256, 0.5)),
        *(({"until": until}, SamplingParams(256)) for until in ([""], "", None)),
        ({"until": ["", "\n", ""]}, SamplingParams(256, stop=["\n"])),
    ],
)
def test_options_mean_what_they_mean_to_the_harness(options: dict[str, Any], params: SamplingParams) -> None:
    assert sampling_params(options) == params


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_beams": 4}, "generation option num_beams=4 has no effect"),
        ({"repetition_penalty": 1.2, "min_p": 0.1}, r"repetition_penalty=1\.2, min_p=0\.1 has no effect"),
        ({"do_sample": True}, "do_sample=True has no effect at temperature 0"),
        ({"top_p": 0.9}, "no effect at temperature 0"),
        ({"max_gen_toks": 0}, "max_tokens is 0"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        sampling_params(options)


def test_a_prompt_needs_room(model: CoLLM) -> None:
    lm = HarnessLM(model, threshold=THRESHOLD, max_length=8)
    options = {"until": [], "max_gen_toks": 5}
    requests = asked("generate_until", [("w9 w8 w1 w2 w3", options), ("w1 w2 w3", options)])
    cut, whole = lm.generate_until(requests, disable_tqdm=True)
    assert cut == whole
    with pytest.raises(ConfigError, match="max_gen_toks is 256, which leaves no room"):
        lm.generate_until(asked("generate_until", [("w1", {})]), disable_tqdm=True)


# Chats

CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.slow
def test_chats_are_rendered_by_the_artefact(model: CoLLM) -> None:
    lm = HarnessLM(model, threshold=THRESHOLD)
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    with pytest.raises(RequestError, match="no chat template"):
        lm.apply_chat_template(messages)
    assert lm.chat_template(True) is None
    chatty = CoLLM(model.base, model.assistants, model.head, model.tokenizer, template=type(model.template)(chat=CHAT))
    other = HarnessLM(chatty, threshold=THRESHOLD)
    assert other.chat_template(True) == CHAT
    assert other.apply_chat_template(messages[:1]) == "[user] w1 [assistant] "
    assert other.apply_chat_template(messages, add_generation_prompt=False) == "[user] w1 [assistant] w2"
    assert other.tokenizer_name != lm.tokenizer_name
    with pytest.raises(ConfigError, match="chat template 'rag' does not exist"):
        other.chat_template("rag")


@pytest.mark.slow
def test_tokens_before_a_chat_are_those_of_training(model: CoLLM) -> None:
    tokenizer = with_bos(model.tokenizer)
    parts = (model.base, model.assistants, model.head, tokenizer)
    chatty = CoLLM(*parts, template=type(model.template)(chat=CHAT), accept_differences=["special_tokens"])
    messages = [{"role": "user", "content": "w1"}]
    with pytest.raises(ConfigError, match="add add_bos_token=false"):
        HarnessLM(chatty, threshold=THRESHOLD).apply_chat_template(messages)
    bare = HarnessLM(chatty, threshold=THRESHOLD, add_bos_token=False)
    assert bare.tok_encode(bare.apply_chat_template(messages))[0] != tokenizer.bos_token_id
    begun = CoLLM(*parts, template=type(model.template)(chat="<pad> " + CHAT), accept_differences=["special_tokens"])
    lm = HarnessLM(begun, threshold=THRESHOLD)
    assert lm.tok_encode(lm.apply_chat_template(messages)).count(tokenizer.bos_token_id) == 1
    assert (lm.prefix_token_id, lm.tok_encode("w1")) == (0, [0, 4])


def with_bos(tokenizer: Any) -> PreTrainedTokenizerFast:
    """Puts <pad> before every text, as BOS."""
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<pad>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    changed.backend_tokenizer.post_processor = TemplateProcessing("<pad> $A", special_tokens=[("<pad>", 0)])
    return changed


# Arguments


@pytest.mark.parametrize(
    ("arguments", "options", "complaint"),
    [
        ({"pretrained": "x", "revision": "main", "peft": "y"}, {}, "unknown model argument peft, revision"),
        ({"pretrained": "x"}, {"max_batch_size": 4}, "unknown model argument max_batch_size"),
        ({"pretrained": "x", "device": "cpu"}, {"device": "cpu"}, "device is given in --model_args and as --device"),
        ({"pretrained": "x", "threshold": "high"}, {}, "threshold is 'high', expected float"),
        ({"pretrained": "x", "max_length": True}, {}, "max_length is True, expected int"),
        ({"threshold": 0.5}, {}, "add pretrained=DIR"),
    ],
)
def test_model_arguments_without_effect_are_refused(
    arguments: dict[str, Any], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        model_arguments(arguments, options)


def test_the_device_of_an_artefact_is_kept_where_nobody_chose_another() -> None:
    unchosen = {"device": EvaluatorConfig().device, "batch_size": 1, "max_batch_size": None}
    assert model_arguments({"pretrained": "x"}, unchosen) == ({"path": "x"}, {"batch_size": 1})
    assert model_arguments({"pretrained": "x", "device": "cuda:1"}, unchosen)[0] == {"path": "x", "device": "cuda:1"}
    assert model_arguments({"pretrained": "x"}, {"device": "cpu"})[0] == {"path": "x", "device": "cpu"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "not calibrated"),
        ({"threshold": 0.5, "policy": "joint"}, "threshold and budget have no effect with another policy"),
        ({"policy": "best"}, "policy is 'best', expected one of"),
        ({"threshold": 0.5, "max_length": 1000}, "max_length is 1000, expected from 1 to 128"),
        ({"threshold": 0.5, "batch_size": "auto:4"}, "batch size is 'auto:4', expected a positive number of texts"),
    ],
)
def test_options_of_a_model_are_checked(model: CoLLM, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        HarnessLM(model, **options)


def test_with_another_policy_greedy_still_means_the_threshold(model: CoLLM) -> None:
    lm = HarnessLM(model, policy="joint")
    with pytest.raises(ConfigError, match="not calibrated"):
        lm.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)


def test_a_harness_that_reads_entry_points_finds_the_model(world: World) -> None:
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    ((name, value),) = re.findall(r'^\[project\.entry-points\."lm_eval\.models"\]\n(\w+) = "(.*)"$', declared, re.M)
    registry: Registry[Any] = Registry("model")
    registry.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    lm = registry.get("collm").create_from_arg_string(f"pretrained={world.sharing},threshold=0.5", {"batch_size": "2"})
    assert isinstance(lm, HarnessLM)
    assert (lm.batch_size, lm.policy) == (2, ThresholdPolicy(0.5))


def test_a_missing_harness_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "collm.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(MissingExtra, match=r"pip install 'collm\[eval\]'"):
        import_module("collm.evaluation.harness")


# The command


def task_file(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
    content = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **config}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["collm", "lm-eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


@pytest.fixture
def tasks(model: CoLLM, tmp_path: Path) -> Path:
    """Prompts (what the collaboration writes is right after every other one), questions with choices, and texts."""
    prompts = [f"w{i} w{i + 3}" for i in range(8)]
    said = model.generate(prompts, SamplingParams(max_tokens=4), threshold=THRESHOLD)
    rows = [
        {"prompt": prompt, "completion": one.text if i % 2 == 0 else "nothing"}
        for i, (prompt, one) in enumerate(zip(prompts, said, strict=True))
    ]
    metrics = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    task_file(
        tmp_path, "answers", rows, output_type="generate_until", doc_to_text="{{prompt}}",
        doc_to_target="{{completion}}", generation_kwargs={"until": [], "max_gen_toks": 4}, metric_list=metrics,
    )  # fmt: skip
    choices = [{"question": f"w{i} w2", "choices": ["w4 w5", f"w{i + 9}"], "label": i % 2} for i in range(6)]
    task_file(
        tmp_path, "choices", choices, output_type="multiple_choice", doc_to_text="{{question}}",
        doc_to_choice="{{choices}}", doc_to_target="label", metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    task_file(
        tmp_path, "texts", [{"text": text} for text in TEXTS], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}],
    )  # fmt: skip
    return tmp_path


@pytest.mark.slow
def test_the_command_gives_the_numbers_of_the_library(
    world: World, model: CoLLM, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # they are many
    options = ["--tasks", "answers,choices,texts", "--include_path", tasks, "--output_path", tmp_path / "out"]
    more = ["--log_samples", "--batch_size", "4", "--model_args", f"threshold={THRESHOLD}"]
    assert run(monkeypatch, world.sharing, *options, *more) == 0
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["config"]["policy"] == f"ThresholdPolicy(threshold={THRESHOLD})"

    task = task_named("rows", metric="exact_match", max_tokens=4)
    systems = systems_named(model, [], ThresholdPolicy(THRESHOLD))
    compared = compare(systems, Evaluation(task, task.load(tasks / "answers.jsonl")), tmp_path / "ours")
    right = [answer.scores["exact_match"] for answer in compared.answers["collaboration"]]
    assert found["results"]["answers"]["exact_match,none"] == pytest.approx(sum(right) / len(right))
    assert sum(right) == 4
    (samples,) = (tmp_path / "out").rglob("samples_answers_*.jsonl")
    said = {row["doc"]["prompt"]: row["resps"][0][0] for row in map(json.loads, samples.read_text().splitlines())}
    assert list(said.values()) == [answer.text for answer in compared.answers["collaboration"]]

    likelihood = sum(sum(read_slowly(model, [1], model.tokenizer(text)["input_ids"])[0]) for text in TEXTS)
    hits = []
    for i in range(6):
        each = [sum(read_slowly(model, *encoded(model, f"w{i} w2", c))[0]) for c in ("w4 w5", f"w{i + 9}")]
        hits.append(each.index(max(each)) == i % 2)
    words = sum(len(text.split()) for text in TEXTS)
    assert found["results"]["texts"]["word_perplexity,none"] == pytest.approx(math.exp(-likelihood / words), rel=1e-4)
    assert found["results"]["choices"]["acc,none"] == pytest.approx(sum(hits) / 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "hf", "--tasks", "answers"], "leave --model and pretrained=.. out"),
        (["--tasks", "answers", "--model_args", "pretrained=other"], "leave --model and pretrained=.. out"),
        (["--num_fewshot", "1"], "no task is given"),
        (["--no_such_option"], "unrecognized arguments: --no_such_option"),
        (["stray", "--tasks", "answers"], "unrecognized arguments: stray"),
    ],
)
def test_wrong_usage(
    world: World, arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run(monkeypatch, world.sharing, *arguments) == 2
    assert complaint in capsys.readouterr().err


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch, "--help") == 0
    assert "lm-evaluation-harness" in capsys.readouterr().out
    assert run(monkeypatch, "anything", "--help") == 0
    assert "--num_fewshot" in capsys.readouterr().out


def test_models_with_different_tokenizers_have_likelihoods_of_segments() -> None:
    base, assistant = two_tokenizers()
    models = writing_model(base, 1), writing_model(assistant, 2)
    pair = CoLLM(models[0], [models[1]], DeferralHead(32, 1), base, tokenizers=[assistant])
    lm = HarnessLM(pair, threshold=THRESHOLD)
    pairs = [("Sure, the capital", " is called Gipil"), ("the river", " runs there. ")]
    answers = lm.loglikelihood(asked("loglikelihood", pairs))
    assert pair.alignment is not None
    for (context, continuation), (total, _) in zip(pairs, answers, strict=True):
        prompts = [one(context, add_special_tokens=False)["input_ids"] for one in (base, assistant)]
        examples = aligned_example(pair.alignment, prompts, continuation, end=False)
        read = [
            read_scores(LanguageModel(model, name="one"), examples.read_by(author))["logprob"]
            for author, model in enumerate(models)
        ]
        assert total == pytest.approx((sum(each.exp() for each in read) / 2).log().sum().item(), abs=1e-4)


@pytest.mark.parametrize("max_length", [12, 20, 64])
def test_windows_of_other_tokenizers_go_on_where_the_last_one_ended(max_length: int) -> None:
    """Models that read one token alone give a text the same likelihood in windows of any length."""
    base, assistant = two_tokenizers()
    models = writing_model(base, 1), writing_model(assistant, 2)
    for model in models:
        for layer in model.model.layers:
            for part in (layer.self_attn.dense, layer.mlp.fc2):
                part.weight.data.zero_()
                part.bias.data.zero_()
    head = DeferralHead(32, 1)
    torch.nn.init.normal_(head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    pair = CoLLM(models[0], [models[1]], head, base, tokenizers=[assistant])
    texts = asked("loglikelihood_rolling", [("the river runs there, 48 miles called pilgrims. " * n,) for n in (1, 3)])
    whole, cut = (
        HarnessLM(pair, threshold=THRESHOLD, max_length=length, batch_size=2).loglikelihood_rolling(
            texts, disable_tqdm=True
        )
        for length in (None, max_length)
    )
    assert cut == pytest.approx(whole, abs=1e-3)
    one = HarnessLM(pair, threshold=THRESHOLD).loglikelihood(asked("loglikelihood", [("", texts[0].args[0])]))
    assert whole[0] == pytest.approx(one[0][0], abs=1e-3)


def test_a_segment_that_does_not_fit_a_window_is_refused() -> None:
    base, assistant = two_tokenizers()
    pair = CoLLM(
        writing_model(base, 1), [writing_model(assistant, 2)], DeferralHead(32, 1), base, tokenizers=[assistant]
    )
    lm = HarnessLM(pair, threshold=THRESHOLD, max_length=4)
    with pytest.raises(RequestError, match="a segment has 8 tokens, expected fewer than 4"):
        lm.loglikelihood_rolling(asked("loglikelihood_rolling", [("the zzzzzzzz",)]), disable_tqdm=True)
