"""Systems beside each other: the same items for all, resumable, costs counted, nothing scored that was not answered."""

from __future__ import annotations

import json
import math
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams, ToolSpec
from collm.atomic import sole_writer
from collm.core.calibration import Calibration, CalibrationPoint
from collm.core.policies import ThresholdPolicy
from collm.errors import ArtefactError, ConfigError, DataError, LoadError, ModelFailure, ToolFailure, WriteError
from collm.evaluation.answers import Answer, AnswerFile, answer_path, read_answers
from collm.evaluation.compare import Comparison, Evaluation, compare
from collm.evaluation.gold import gold_views, reliability
from collm.evaluation.intervals import Interval
from collm.evaluation.report import render_page
from collm.evaluation.results import SystemResult, verdict
from collm.evaluation.run_report import deferral_tables, oracle_line, parse_prices, priced, report_of, run_charts
from collm.evaluation.systems import names_in, short_names, systems_named, thresholds_named
from collm.evaluation.tasks import task_named
from collm.evaluation.tasks.task import Task, TaskItem
from collm.tools.calls import in_process
from collm.training.data import Row
from collm.training.examples import Example, Examples
from collm.training.inspection import TokenViews

THRESHOLD = 0.5


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    head = DeferralHead(32, 2)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(3))
    return CoLLM(tiny_model(0), [tiny_model(1), tiny_model(2, hidden_size=48)], head, tokenizer)


@pytest.fixture
def task(model: CoLLM) -> Task:
    return task_named("rows", metric="exact_match", max_tokens=6)


@pytest.fixture
def items(model: CoLLM) -> list[TaskItem]:
    """What the base says is right for every other prompt."""
    prompts = [f"w{i} w{i + 3}" for i in range(10)]
    said = model.generate(prompts, SamplingParams(max_tokens=6), threshold=1.0)
    references = [one.text if i % 2 == 0 else "nothing" for i, one in enumerate(said)]
    return [
        TaskItem(str(i), prompt, ref, f"line {i}", Row(prompt, ref, None, f"line {i}"))
        for i, (prompt, ref) in enumerate(zip(prompts, references, strict=True))
    ]


def run(
    model: CoLLM, task: Task, items: list[TaskItem], out: Path, names: str = "base,assistant-2,random"
) -> Comparison:
    systems = systems_named(model, names.split(","), ThresholdPolicy(THRESHOLD))
    return compare(systems, Evaluation(task, items, max_batch=4), out)


@pytest.mark.slow
def test_every_system_answers_every_item_as_generate_does(
    model: CoLLM, task: Task, items: list[TaskItem], tmp_path: Path
) -> None:
    found = run(model, task, items, tmp_path, "base,assistant,assistant-2,random,mixture,threshold=0.2")
    params, prompts = SamplingParams(max_tokens=6), [str(item.prompt) for item in items]
    expected = {
        "collaboration": model.generate(prompts, params, threshold=THRESHOLD),
        "base": model.generate(prompts, params, threshold=1.0),
        "assistant": model.generate(prompts, params, policy="single:writer=1"),
        "assistant-2": model.generate(prompts, params, policy="single:writer=2"),
        "mixture": model.generate(prompts, params, policy="mixture"),
        "threshold=0.2": model.generate(prompts, params, threshold=0.2),
    }
    for name, completions in expected.items():
        assert [one.text for one in found.answers[name]] == [one.text for one in completions], name
    by_name = {result.name: result for result in found.results}
    assert by_name["base"].measures["exact_match"].mean == 0.5
    assert by_name["collaboration"].difference is None
    scores = [[one.scores["exact_match"] for one in found.answers[name]] for name in ("base", "collaboration")]
    difference = by_name["base"].difference
    assert difference is not None
    assert difference.mean == pytest.approx((sum(scores[0]) - sum(scores[1])) / 10)
    assert (by_name["base"].deferral_rate, by_name["assistant-2"].deferral_rate) == (0.0, 1.0)
    assert {author for one in found.answers["assistant-2"] for author in one.authors} == {2}
    assert by_name["random"].deferral_rate == pytest.approx(by_name["collaboration"].deferral_rate, abs=0.2)


@pytest.mark.slow
def test_a_model_alone_costs_its_own_passes(model: CoLLM, task: Task, items: list[TaskItem], tmp_path: Path) -> None:
    found = {result.name: result for result in run(model, task, items, tmp_path, "base,assistant-2").results}
    for name, author in (("base", 0), ("assistant-2", 2)):
        module = model.members[author].module
        weights = sum(p.numel() for p in module.parameters()) - module.get_input_embeddings().weight.numel()
        ((model_name, used),) = found[name].models.items()
        assert model_name == name
        assert found[name].flops == pytest.approx(2 * weights * used["tokens_read"])
        assert used["tokens_read"] >= 2 + 5  # the prompt, and every token but the last
    assert set(found["collaboration"].models) >= {"base", "assistant"}


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_item_by_item(
    model: CoLLM, task: Task, items: list[TaskItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, task, items, tmp_path / "whole")
    scored: list[str] = []
    score = type(task).score

    def dying(self: Any, item: TaskItem, text: str) -> dict[str, float]:
        if len(scored) == 6:
            raise KeyboardInterrupt
        scored.append(item.id)
        return score(self, item, text)

    with monkeypatch.context() as patch:
        patch.setattr(type(task), "score", dying)
        with pytest.raises(KeyboardInterrupt):
            run(model, task, items, tmp_path / "cut")
    assert not (tmp_path / "cut" / "results.json").exists()
    path = answer_path(tmp_path / "cut", "collaboration")
    path.write_bytes(path.read_bytes() + b'{"answer": {"id": "h')  # a line cut short
    before = path.read_bytes()
    assert len(read_answers(tmp_path / "cut", "collaboration")) == 6
    assert path.read_bytes() == before, "reading does not write"
    asked: list[int] = []
    generate = CoLLM.generate
    monkeypatch.setattr(CoLLM, "generate", lambda self, p, *a, **k: asked.append(len(p)) or generate(self, p, *a, **k))
    again = run(model, task, items, tmp_path / "cut")
    assert sum(asked) == 4 + 10 * 3
    for name, answers in whole.answers.items():
        assert [one.token_texts for one in again.answers[name]] == [one.token_texts for one in answers], name
    assert [result.measures for result in again.results] == [result.measures for result in whole.results]


@pytest.mark.slow
def test_answers_to_something_else_are_refused(model: CoLLM, task: Task, items: list[TaskItem], tmp_path: Path) -> None:
    run(model, task, items, tmp_path, "base")
    with pytest.raises(ConfigError, match=r"holds answers of other items; .* give the same options to resume"):
        run(model, task, items[:5], tmp_path, "base")
    with pytest.raises(ConfigError, match="holds answers with measure='exact_match', now it is 'contains'"):
        run(model, task_named("rows", metric="contains"), items, tmp_path, "base")
    systems = systems_named(model, [], ThresholdPolicy(THRESHOLD))
    with pytest.raises(ConfigError, match=r"holds answers with temperature=0\.0, now it is 0\.5"):
        compare(systems, Evaluation(task, items, SamplingParams(temperature=0.5)), tmp_path)
    with torch.no_grad():
        model.head.bias.add_(1)
    with pytest.raises(ConfigError, match="holds answers of other models"):
        run(model, task, items, tmp_path, "base")
    answer_path(tmp_path, "base").write_text('{"identity": {}}\n{"answer": {}}\n')
    with pytest.raises((ArtefactError, ConfigError)):
        read_answers(tmp_path, "base")


def test_a_full_disk_is_one_sentence_and_the_answers_so_far_are_kept(tmp_path: Path) -> None:
    answer = Answer("a", [1], ["w1" * 400], [0], [0.0], "length", {}, 0.1)
    file = AnswerFile(answer_path(tmp_path, "base"), {"seed": 0})
    file.add(answer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1200, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"could not write .*base.jsonl: File too large"):
            file.add(replace(answer, id="b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(read_answers(tmp_path, "base")) == ["a"]
    AnswerFile(answer_path(tmp_path, "base"), {"seed": 0}).add(replace(answer, id="c"))
    assert list(read_answers(tmp_path, "base")) == ["a", "c"]


def test_a_failing_model_stops_the_run_and_scores_nothing(
    model: CoLLM, task: Task, items: list[TaskItem], tmp_path: Path
) -> None:
    with torch.no_grad():
        model.members[2].module.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ModelFailure, match="NaN"):
        run(model, task, items, tmp_path, "base,assistant-2")
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_a_failing_tool_stops_the_run_and_is_asked_again(
    model: CoLLM, task: Task, items: list[TaskItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = True

    def answer(text: str) -> str | ToolFailure:
        return ToolFailure("out of order") if broken and text.startswith("w5") else " w3"

    monkeypatch.setattr("collm.models.tools.open_tool", lambda spec: in_process(answer))
    tool = CoLLM(model.base, [ToolSpec("calculator", eps=0.05)], DeferralHead(32), model.tokenizer)
    systems = systems_named(tool, [], ThresholdPolicy(0.4))  # a new head gives even odds: the tool is always asked
    ask = partial(compare, systems, Evaluation(task, items, max_batch=1), tmp_path)
    with pytest.raises(ToolFailure, match=r"assistant failed 6 times while answering line 5"):
        ask()
    assert list(read_answers(tmp_path, "collaboration")) == ["0", "1", "2", "3", "4"]
    broken = False
    assert ask().results[0].deferral_rate == 1.0


def test_the_tokens_that_a_judge_rejects_are_counted(
    model: CoLLM, task: Task, items: list[TaskItem], tmp_path: Path
) -> None:
    name = "threshold:threshold=0.9,judge=exact"
    systems = systems_named(model, [name], ThresholdPolicy(THRESHOLD))
    own, judged = compare(systems, Evaluation(task, items, SamplingParams(max_tokens=6)), tmp_path).results
    completions = model.generate([str(item.prompt) for item in items], SamplingParams(max_tokens=6), policy=name)
    rejected = sum(len(one.rejected) for one in completions)
    assert judged.rejected == rejected / sum(len(one.token_ids) for one in completions) > 0
    assert own.rejected == 0
    (row, other), note = report_of(tmp_path).rows, f"{judged.rejected:.1%} of the tokens in place of rejected ones"
    assert note in other.note
    assert "rejected" not in row.note


def test_items_must_differ_and_the_directory_be_free(
    model: CoLLM, task: Task, items: list[TaskItem], tmp_path: Path
) -> None:
    with sole_writer(tmp_path), pytest.raises(ConfigError, match=r"is being written by process \d+ on "):
        run(model, task, items, tmp_path, "base")
    assert not (tmp_path / "answers").exists()
    with pytest.raises(DataError, match="no items"):
        run(model, task, [], tmp_path)
    with pytest.raises(DataError, match=r"line 1 and line 1 have the same id '1'"):
        run(model, task, [*items, items[1]], tmp_path)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("assistant-3", "the authors are base, assistant, assistant-2"),
        ("assistant-1", "the authors are base, assistant, assistant-2"),
        ("assistant-x", "the authors are base, assistant, assistant-2"),
        ("better", "cannot compare 'better'; expected one of base, assistant"),
        ("threshold=high", "expected a number"),
        ("sft=", "cannot compare 'sft='"),
        ("sft=nowhere", "nowhere"),  # before anything is answered
        ("proxy=nowhere", "nowhere"),
    ],
)
def test_unknown_systems_are_refused(model: CoLLM, name: str, complaint: str) -> None:
    with pytest.raises((ConfigError, LoadError), match=complaint):
        systems_named(model, ["base", name], ThresholdPolicy(0.5))


@pytest.mark.slow
def test_other_models_by_path(
    model: CoLLM, task: Task, items: list[TaskItem], saved_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = saved_model("other", 7, hidden_size=64)
    found = run(model, task, items, tmp_path / "out", f"sft={path},proxy={saved_model('untuned', 8)}")
    assert [result.name.partition("=")[0] for result in found.results] == ["collaboration", "sft", "proxy"]
    assert [list(result.models) for result in found.results[1:]] == [["sft"], ["base", "assistant", "untuned"]]
    _, sft = systems_named(model, [f"sft={path}"], ThresholdPolicy(0.5))
    prompts = [str(item.prompt) for item in items]
    alone = sft.load().generate(prompts, SamplingParams(max_tokens=6), threshold=1.0)
    assert [one.text for one in found.answers[f"sft={path}"]] == [one.text for one in alone]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("base,,sft=a/b=c,threshold=0.4", ["base", "sft=a/b=c", "threshold=0.4"]),
        ("contrastive:alpha=0.1,beta=0.5,sft=a", ["contrastive:alpha=0.1,beta=0.5", "sft=a"]),
        ("random:rate=0.2,threshold=0.4,base", ["random:rate=0.2", "threshold=0.4", "base"]),
        ("base,beta=0.5", ["base", "beta=0.5"]),
        ("price:0.7,1.2,base,random", ["price:0.7,1.2", "base", "random"]),
        ("single:writer=1,threshold:judge=joint,base", ["single:writer=1", "threshold:judge=joint", "base"]),
    ],
)
def test_commas_part_systems_but_not_the_options_of_one(text: str, names: list[str]) -> None:
    assert names_in(text) == names
    named = short_names(["base", "sft=/models/a/", "sft=org/b", "proxy=x/b", "proxy=y/b", "threshold=0.4"])
    assert list(named.values()) == ["base", "sft=a", "sft=b", "proxy=x/b", "proxy=y/b", "threshold=0.4"]


def test_a_curve_leaves_out_what_other_systems_show(model: CoLLM) -> None:
    thresholds = (-1.0, 0.0, 0.3, 0.99998605251, 0.99998605252, 1.0)
    points = [CalibrationPoint(t, 0.5, 0.5, 0.4, 0.6, 0.4, 0.6) for t in thresholds]
    calibration = Calibration(points, "exact_match", 1, {})
    one = CoLLM(model.base, model.assistants[:1], DeferralHead(32, 1), model.tokenizer)
    one.calibration = model.calibration = calibration
    named = [thresholds_named(pair, ["base", "assistant"], 0.3) for pair in (one, model)]
    inner = ["threshold=0.0", "threshold=0.99998605251", "threshold=0.99998605252"]
    assert named == [inner, ["threshold=-1.0", *inner]]
    assert len(thresholds_named(one, [], 0.4)) == 6


def test_the_line_of_an_oracle_by_hand() -> None:
    base = [answer("a", ["x"] * 2, [0] * 2, 0.0), answer("b", ["x"] * 4, [0] * 4, 0.0)]
    base += [answer("c", ["x"] * 4, [0] * 4, 1.0)]
    one = [answer("a", ["x"] * 8, [1] * 8, 1.0), answer("b", ["x"] * 2, [1] * 2, 1.0), answer("c", ["x"], [1], 0.0)]
    line = oracle_line({"base": base, "assistant": one}, "m")
    # b first, whose right answer costs 2 tokens in place of 4, then a, which costs 8 in place of 2
    assert line == [(0.0, pytest.approx(1 / 3)), (2 / 8, pytest.approx(2 / 3)), (10 / 14, pytest.approx(1.0))]
    assert oracle_line({"base": base}, "m") == []
    assert oracle_line({"base": base, "assistant": one}, "other") == []


def test_prices_are_of_tokens_read_and_written() -> None:
    prices = parse_prices(["base=0.5", "assistant-2=2:8"])
    used = {"tokens_read": 100.0, "tokens_written": 10.0, "forward_passes": 3.0}
    one = replace(result("collaboration", 0.5, None), models={"base": used, "assistant-2": used})
    assert priced([one], prices) == {"collaboration": pytest.approx((100 * 0.5 + 100 * 2 + 10 * 8) / 1e6 * 1000)}
    one.models["assistant"] = used
    with pytest.raises(ConfigError, match="assistant, which has no price; add --price assistant="):
        priced([one], prices)
    with pytest.raises(ConfigError, match=r"there is a price for sft, .* expected base, assistant, assistant-2"):
        priced([one], parse_prices(["base=1", "assistant=1", "assistant-2=1", "sft=1"]))

    for text in ("base", "base=", "=1", "base=1:2:3", "base=-1", "base=cheap", "base=nan"):
        with pytest.raises(ConfigError, match="expected NAME=READ or NAME=READ:WRITTEN"):
            parse_prices([text])


@torch.no_grad()
def test_gold_views_are_what_each_model_says(model: CoLLM) -> None:
    texts = [model.tokenizer(text).input_ids for text in ("w1 w2 w3 w4", "w5 w6 w7")]
    examples = [Example(ids, [i >= 2 for i in range(len(ids))]) for ids in texts]
    views = gold_views(model, Examples(examples))
    at = 0
    for ids in texts:
        logits = [member.module(torch.tensor([ids])).logits[0].log_softmax(-1) for member in model.members]
        hidden = model.members[0].hidden_states(torch.tensor([ids]))[0]
        for place in range(2, len(ids)):
            said = [float(one[place - 1, ids[place]]) for one in logits]
            right = [int(one[place - 1].argmax()) == ids[place] for one in logits]
            assert [float(views.base_logprob[at]), *views.assistant_logprobs[at].tolist()] == pytest.approx(said)
            assert [bool(views.base_correct[at]), *views.assistant_correct[at].tolist()] == right
            assert views.defer_logits[at].tolist() == pytest.approx(model.head(hidden[place - 1]).tolist(), abs=1e-5)
            at += 1
    assert at == len(views.base_logprob)


def test_reliability_by_hand() -> None:
    base = torch.tensor([True, False, False, True, False, True])
    theirs = torch.tensor([[False, False], [True, False], [False, True], [True, True], [False, False], [False, True]])
    logits = torch.tensor([[-3.0, -9], [3, -9], [-9, 3], [3, 3], [3, 3], [-9, -2.9]])
    zeros = torch.zeros(6)
    views = TokenViews(zeros, base, zeros.unsqueeze(-1).expand(6, 2), theirs, logits)
    low, high = reliability(views)
    assert (low["tokens"], low["assistant_right"]) == (1, 0.0)  # the first; the last has both right, the asked one too
    assert (high["tokens"], high["assistant_right"]) == (2, 1.0)
    assert high["defer_prob"] == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-4)
    assert high["low"] < high["assistant_right"]


def test_the_reliability_of_a_head_with_a_cost_is_not_called_wrong() -> None:
    """Such a head should ask only where the assistant gains more than the cost."""
    bins = [{"defer_prob": 0.2, "assistant_right": 0.6, "low": 0.5, "high": 0.7, "tokens": 90}]
    tokens = {"measures": {"head_auc": 0.8}, "reliability": bins}
    found = Comparison("t", None, [], [result("collaboration", 0.5, None)], {}, ["base"], 0.5, {}, tokens)
    (chart,) = run_charts(found, [], None)
    assert "deferral cost should lie above the line" in chart.note
    assert "too seldom" not in chart.note


def test_a_judge_outside_gets_the_outputs_of_every_system(
    model: CoLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.paper.alpaca_eval.AlpacaEval.max_tokens", 6)
    source = tmp_path / "alpaca.json"
    source.write_text(json.dumps([{"instruction": f"w{i} w3", "dataset": "d"} for i in range(3)]))
    task = task_named("recipes.paper.alpaca_eval:AlpacaEval")
    found = run(model, task, task.load(source), tmp_path / "out", "base")
    for name in ("collaboration", "base"):
        outputs = json.loads((tmp_path / "out" / "outputs" / f"{name}.json").read_text())
        assert [one["output"] for one in outputs] == [answer.text for answer in found.answers[name]]
        assert {one["generator"] for one in outputs} == {name}
    assert found.measure is None
    report = report_of(tmp_path / "out")
    assert "outputs/ contains the answers of every system" in report.summary
    assert report.charts == []  # nothing is scored, and there are no solutions to read
    page = render_page(report)
    assert "What each model did for an item" in page
    assert "ccuracy" not in page
    assert report.examples[0].score is None


# Words


def result(name: str, mean: float, difference: tuple[float, float] | None, flops: float = 1.0) -> SystemResult:
    interval = None if difference is None else Interval(sum(difference) / 2, *difference)
    return SystemResult(name, 100, {"m": Interval(mean, mean - 0.1, mean + 0.1)}, interval, 0.1, {}, flops, 10.0, 1.0)


COSTS = "2.00 times its FLOPs, 1.00 times its tokens per second"
CHOOSE_IT = "of the two the assistant alone is the better choice"
WORDS: list[tuple[Any, str]] = [
    (("base", 0.3, (-0.3, -0.1), 0.1), "is better than the base alone (difference +20.0 points (+10.0 to +30.0)) and"),
    (("base", 0.5, (-0.1, 0.1), 0.1), "times its tokens per second: of the two the base alone is the better choice."),
    (("base", 0.5, (-0.1, 0.1), 0.5), "does not differ significantly from the base alone (difference +0.0 points ("),
    (("assistant", 0.7, (0.1, 0.3), 0.5), f"(difference -20.0 points (-30.0 to -10.0)) and takes {COSTS}: {CHOOSE_IT}"),
    (("assistant", 0.7, (0.1, 0.3), 4.0), "takes 0.25 times its FLOPs, 1.00 times its tokens per second."),
    (("assistant", 0.3, (-0.3, -0.1), 0.5), "1.00 times its tokens per second."),
]  # fmt: skip


def test_the_verdict_says_plainly_which_is_the_better_choice() -> None:
    for other, words in WORDS:
        assert words in verdict("t", "m", [result("collaboration", 0.5, None), result(*other)])
    others = {"sft=models/a": (-0.3, -0.1), "random": (-0.2, -0.1), "mixture": (-0.1, 0.1), "product": (0.1, 0.2)}
    results = [result("collaboration", 0.5, None), *(result(name, 0.5, ends) for name, ends in others.items())]
    said = verdict("t", "m", [*results, result("threshold=0.1", 0.9, (0.3, 0.5))])
    assert said.endswith(
        "The collaboration is better than sft=a and random; it does not differ significantly from mixture; it is worse "
        "than product."
    )


def answer(id_: str, texts: list[str], authors: list[int], score: float = 1.0) -> Answer:
    return Answer(id_, [1] * len(texts), texts, authors, [0.5] * len(texts), "eos", {"m": score}, 1.0)


def test_insights_count_by_hand() -> None:
    own = [
        answer("a", [" the", " 12", ",", "5", ""], [0, 1, 1, 0, 1], 0.0),
        answer("b", [" the", "\n", " 12"], [1, 0, 2], 1.0),
    ]
    classes, tokens, runs = deferral_tables(own)
    assert [row[:3] for row in tokens.rows] == [(" 12", "2", "2"), ("", "1", "1"), (" the", "1", "2"), (",", "1", "1")]
    assert {row[0]: row[1:] for row in classes.rows} == {
        "number": ("2", "3", "66.7%"), "word begins": ("1", "2", "50.0%"), "punctuation": ("1", "1", "100.0%"),
        "no text": ("1", "1", "100.0%"), "white space": ("0", "1", "0.0%"),
    }  # fmt: skip
    assert runs.rows == [("1", "3"), ("2", "1")]
    assert deferral_tables([answer("c", ["ing"], [1])])[0].rows[0][0] == "word goes on"
    answers = {"collaboration": own, "base": [answer("a", [], [], 1.0), answer("b", [], [], 1.0)]}
    _, worse = Comparison("t", "m", [], [], answers, [], 0.5, {}).examples()
    assert [one.id for one in worse] == ["a"]


@pytest.mark.slow
def test_the_page_of_a_run(model: CoLLM, task: Task, items: list[TaskItem], tmp_path: Path) -> None:
    found = run(model, task, items, tmp_path, "base,assistant,threshold=0.9,threshold=0.1")
    report = report_of(tmp_path)
    read = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in read["rows"][:3]] == ["collaboration", "base", "assistant"]
    assert report.summary == read["verdict"] == found.verdict
    assert read["rows"][1]["measures"]["exact_match"]["mean"] == 0.5
    assert [row.name for row in report.rows] == ["collaboration", "base", "assistant"]
    curve, cost, trusted = report.charts
    assert (curve.y_label, curve.heading) == ("Exact_match", "Exact_match against deferral rate")
    assert (cost.y_label, cost.heading, report.measure) == ("Exact_match", "Exact_match against cost", "Exact_match")
    assert sum(int(point.name.split()[0]) for point in trusted.curve) <= 5 * 7 + 5 * 2
    on_curve = ["threshold 0.1", "threshold 0.5", "threshold 0.9", "threshold 1"]  # with two assistants no other end
    assert sorted(point.name for point in curve.curve) == on_curve
    assert [mark.name for mark in curve.marks] == ["collaboration", "base", "assistant"]
    rows = {row.name: row for row in report.rows}
    ends = [(0.0, rows["base"].accuracy), (1.0, rows["assistant"].accuracy)]
    assert curve.lines["whole answers at random"] == ends
    flops = {result.name: result.flops / 1e9 for result in found.results}
    assert {mark.name: mark.x for mark in cost.marks} == {name: flops[name] for name in rows}
    own = found.answers["collaboration"]
    assert all(len(of_author) == 5 for token in report.examples[0].tokens for of_author in token.candidates)
    assert len(report.examples[0].tokens) == len(own[0].token_ids)
    priced = report_of(tmp_path, parse_prices(["base=1", "assistant=2", "assistant-2=3"]))
    used = found.results[1].models["base"]["tokens_read"]
    assert next(mark.x for mark in priced.charts[1].marks if mark.name == "base") == pytest.approx(used / 1000)
    assert [one.score for one in report.examples] == [one.scores["exact_match"] for one in own]
    page = render_page(report)
    measures, costs, *_ = report.tables
    assert measures.rows == []  # exact_match alone, which stands above
    assert [name for name, *_ in costs.rows][:2] == ["collaboration: base", "collaboration: assistant"]
    for text in ("What kind of token assistants write", "How many tokens in a row", "Where an assistant led"):
        assert text in page
    assert "assistant-2" in page
    assert not re.search(r"http(?!-equiv|s?://www\.w3\.org)", page)
    (tmp_path / "results.json").unlink()
    with pytest.raises(ArtefactError, match="no finished evaluation"):
        report_of(tmp_path)


@pytest.mark.slow
def test_the_report_shows_who_writes_for_which_kind_of_prompt(
    model: CoLLM, task: Task, items: list[TaskItem], tmp_path: Path
) -> None:
    kinds = [replace(item, kind="even" if i % 2 == 0 else "odd") for i, item in enumerate(items)]
    found = run(model, task, kinds, tmp_path, "base")
    by_name = {table.name: table for table in report_of(tmp_path).tables}
    assert by_name["kinds"].columns == ("", "base", "assistant", "assistant-2", "tokens")
    assert [row[0] for row in by_name["kinds"].rows] == ["all", "even", "odd"]
    authors = [author for answer in found.answers["collaboration"][1::2] for author in answer.authors]
    shares = [f"{authors.count(author) / len(authors):.1%}" for author in range(3)]
    assert by_name["kinds"].rows[2][1:] == (*shares, f"{len(authors):,}")
    assert [row[0] for row in by_name["confusion"].rows] == ["assistant should", "assistant-2 should", "base should"]
    assert found.tokens is not None
    assert sum(map(sum, found.tokens["confusion"])) == found.tokens["num_tokens"]
