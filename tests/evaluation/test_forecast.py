"""What a forecast says of planted scores, against counting token by token."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from collm.cli.main import app
from collm.engine.speculation import PassTimes
from collm.evaluation.forecast import (
    DOUBT,
    LEARNED,
    ORACLE,
    RANDOM,
    Drafting,
    Forecast,
    RatePoint,
    forecast,
    tokens_per_pass,
    tokens_per_s,
    written,
)
from collm.evaluation.forecast_report import forecast_report
from collm.evaluation.gold import likelihoods, teacher_forced, views_of
from collm.evaluation.intervals import Interval
from collm.evaluation.report import render_page
from collm.run import RunConfig
from collm.run.data import encode_for, score_run
from collm.run.forecast import forecast_run
from collm.training.data import write_rows
from collm.training.scores import Scores
from tests.training.conftest import make_scores, random_examples
from tests.two_tokenizers import TEXTS, two_tokenizers, writing_model

EXAMPLES = random_examples(60, seed=5)
COUNTS = [one.num_targets for one in EXAMPLES]
M, SIZE = sum(COUNTS), 6


def planted(num_assistants: int = 1, *, noise: float = 0.1, shift: float = 0.0) -> tuple[Scores, list[Scores]]:
    """Scores with gains that a head could learn, but for noise. Every third token is one that a tool does not know."""
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(M, SIZE, generator=draw)
    gains = 2 * hidden[:, :num_assistants] + noise * torch.randn(M, num_assistants, generator=draw) + shift
    found = make_scores(EXAMPLES, lambda gold: -6.0 - gold / 90)
    doubt = torch.randn(M, 3, generator=draw)
    base = replace(found, hidden=hidden.split(COUNTS), doubt=doubt, predicted=torch.arange(M, dtype=torch.int32) // 4)
    others = [
        replace(
            found,
            logprobs=found.logprobs + gains[:, k],
            corrects=gains[:, k] > 1,
            predicted=torch.arange(M, dtype=torch.int32) // 8 * 2,
        )
        for k in range(num_assistants)
    ]
    return base, others


@cache
def usual() -> Forecast:
    return forecast(*planted(), clip=8.0)


def timed(**seconds: float) -> PassTimes:
    """Pass times by number of tokens: _1=0.2."""
    times = PassTimes()
    for tokens, taken in seconds.items():
        times.record(int(tokens[1:]), taken)
    return times


def silent(scores: Scores) -> Scores:
    return replace(scores, abstained=torch.arange(M) % 3 == 0, predicted=None)


@pytest.mark.parametrize("num_assistants", [1, 2])
def test_a_rule_writes_what_the_exact_curve_says(num_assistants: int) -> None:
    base, assistants = planted(num_assistants)
    views = views_of(*map(likelihoods, (base, silent(assistants[0]), *assistants[1:])))
    scores = torch.randn(M, num_assistants, generator=torch.Generator().manual_seed(3))
    best = torch.full_like(scores, -torch.inf).scatter(
        -1, scores.argmax(-1, keepdim=True), scores.amax(-1, keepdim=True)
    )
    curve = teacher_forced(replace(views, defer_logits=best))
    for point in [curve[index] for index in range(0, len(curve), 17)]:
        nll, right, rates = written(views, scores, point.deferral_rate)
        assert rates.sum().item() == pytest.approx(point.deferral_rate)
        assert nll.double().mean().item() == pytest.approx(point.nll, rel=1e-5)
        assert right.double().mean().item() == pytest.approx(point.accuracy)


def test_of_equal_scores_chance_decides() -> None:
    base, (assistant,) = planted()
    views = views_of(likelihoods(base), likelihoods(silent(assistant)))
    nll, right, rates = written(views, torch.zeros(M, 1), 0.2)
    known = torch.arange(M) % 3 != 0
    share = torch.where(known, 0.2 * M / known.sum(), 0.0)
    torch.testing.assert_close(
        nll.double(), -(1 - share) * base.logprobs - share * assistant.logprobs, check_dtype=False
    )
    assert rates.tolist() == pytest.approx([0.2])
    assert right.mean().item() == pytest.approx((share * assistant.corrects).double().mean().item())
    assert written(views, torch.zeros(M, 1), 0.9)[2].tolist() == pytest.approx([known.double().mean().item()])


def test_authors_by_hand() -> None:
    base, assistants = planted(2, shift=-0.5)
    found = forecast(base, assistants, clip=8.0)
    logprobs = torch.stack([base.logprobs, *(one.logprobs for one in assistants)])
    best = logprobs.argmax(0)
    for author, one in enumerate(found.authors):
        lead = logprobs[author] - logprobs[[at for at in range(3) if at != author]].amax(0)
        assert one.nll.mean == pytest.approx(-logprobs[author].double().mean().item())
        assert one.best.mean == pytest.approx((best == author).double().mean().item())
        assert one.best.low < one.best.mean < one.best.high
        assert one.lead_nats == pytest.approx(lead[best == author].mean().item(), rel=1e-5)
        assert one.pass_ms is None
    ours, theirs = base.corrects, assistants[1].corrects
    cases = (ours & theirs, ours & ~theirs, ~ours & theirs, ~ours & ~theirs)
    assert found.authors[2].agreement == pytest.approx([case.double().mean().item() for case in cases])
    assert found.reachable_nll.mean == pytest.approx(-logprobs.amax(0).double().mean().item())


@pytest.mark.slow
def test_a_head_that_can_learn_pays_and_noise_asks_for_rows() -> None:
    (base, assistants), found = planted(), usual()
    point = found.points[3]
    assert point.rate == found.rate == 0.3
    assert point.nll[ORACLE].mean < point.nll[LEARNED].mean < point.nll[ORACLE].mean + 0.02
    assert point.nll[LEARNED].mean < point.nll[RANDOM].low
    assert found.minus[RANDOM].high < 0
    assert found.minus[DOUBT].mean == pytest.approx(point.nll[LEARNED].mean - point.nll[DOUBT].mean)
    assert found.verdict.startswith("The head will pay: with 30% of the tokens by assistants, expect")
    assert [*found.learning] == [12, 24, 48]
    noise = replace(base, hidden=torch.randn(M, SIZE).split(COUNTS))
    assert forecast(noise, assistants, clip=8.0).verdict.startswith("More rows: a head from 48 chooses")
    without = forecast(replace(base, hidden=None), assistants, clip=8.0)
    assert without.rule == DOUBT
    assert "cache_hidden_states" in without.verdict
    bare = forecast(replace(base, hidden=None, doubt=None), assistants, clip=8.0)
    assert [*bare.points[0].nll] == [RANDOM, ORACLE]
    assert "cache_hidden_states" in bare.verdict


def test_a_tool_is_asked_only_where_it_knows() -> None:
    base, (assistant,) = planted()
    found = forecast(base, [silent(assistant)], clip=8.0, times=[timed(_1=0.2), None])
    assert [point.rate for point in found.points] == [0.05, 0.1, 0.2, 0.3, 0.5]
    assert found.authors[1].pass_ms is found.drafting is None
    assert found.points[0].tokens_per_s == pytest.approx(5)
    assert found.authors[0].pass_ms == pytest.approx(200)
    assert found.authors[1].nll.mean < found.authors[0].nll.mean + 0.1


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"reachable": 2.99}, "Keep the base"),
        ({"other": 1.0, "alone_ms": 10.0}, "Use the assistant alone"),
        ({"other": 1.0, "drafted": 70.0}, "Use speculative decoding"),
        ({"other": 1.0}, "Tune the base first"),
        ({"other": 1.0, "alone_ms": 10.0, "fastest": 150.0}, "Tune the base first"),
        ({"other": 1.0, "drafted": 70.0, "fastest": 150.0}, "Tune the base first"),
        ({"other": 1.0, "alone_ms": None, "rate": 0.3, "fastest": 150.0}, "Ask the tool at every token"),
        ({"base": 9.0, "other": 2.5}, "The head will pay"),
        ({"other": 2.5, "random": 0.01}, "More rows"),
        ({"other": 2.5, "random": None}, "Keep the base's hidden states"),
        ({"other": 2.5}, "The head will pay"),
        ({"other": 1.0, "alone_ms": None, "rate": 0.3}, "Ask the tool at every token"),
        ({"other": 2.5, "alone_ms": None, "rate": 0.3}, "The head will pay"),
    ],
)
def test_each_verdict_has_its_case(changes: dict[str, Any], verdict: str) -> None:
    """A base of 3 nats and a collaboration of 2 nats, which writes 50 tokens/s."""
    usually = {
        "base": 3.0,
        "other": 1.5,
        "rate": 0.9,
        "reachable": 1.0,
        "alone_ms": 40.0,
        "drafted": 20.0,
        "random": -0.1,
    }
    case = usually | {"fastest": 50.0, "ours": 50.0} | changes
    found = usual()
    base, other = found.authors
    nll = {LEARNED: Interval(2.0, 2.0, 2.0), RANDOM: Interval(2.2, 2.2, 2.2)}
    authors = (
        replace(base, nll=Interval(case["base"], 0.0, 9.0)),
        replace(other, nll=Interval(case["other"], 0.0, 9.0), pass_ms=case["alone_ms"]),
    )
    random = case["random"]
    made: Forecast = replace(
        found,
        authors=authors,
        points=tuple(
            RatePoint(rate, nll, nll, case[speed])
            for rate, speed in ((0.05, "fastest"), (0.3, "ours"), (case["rate"], "ours"))
        ),
        reachable_nll=Interval(case["reachable"], 0.0, 9.0),
        minus={} if random is None else {RANDOM: Interval(random, random, random)},
        drafting=Drafting(4, 3.0, case["drafted"]),
    )
    assert made.verdict.startswith(verdict)


def test_speeds_follow_from_passes() -> None:
    base, assistant = timed(_1=0.1), timed(_1=0.5, _4=0.8)
    assert tokens_per_s([base, assistant], [0.25]) == pytest.approx(1 / (0.1 + 0.25 * 0.8))
    assert tokens_per_s([base, assistant, assistant], [0.25, 1.0]) == pytest.approx(1 / (0.1 + 0.25 * 0.8 + 0.5))
    assert tokens_per_s([base, assistant], [0.0]) == pytest.approx(10)
    assert tokens_per_s([base, None], [0.25]) == pytest.approx(10)  # a tool
    assert tokens_per_s([None, None], [0.25]) is None


@pytest.mark.parametrize(
    ("agrees", "length", "tokens"), [("1" * 12, 3, 4.0), ("0" * 9, 3, 1.0), ("110111010", 2, 9 / 4)]
)
def test_drafts_are_accepted_up_to_the_first_that_is_wrong(agrees: str, length: int, tokens: float) -> None:
    assert tokens_per_pass([[one == "1" for one in agrees]], length) == tokens


def test_the_fastest_draft_is_planned() -> None:
    base, assistants = planted()  # argmaxes agree on runs of 4 tokens of 8
    slow, fast = timed(_1=1.0, _9=1.0), timed(_1=0.01)
    found = forecast(base, assistants, clip=8.0, times=[fast, slow]).drafting
    assert found is not None
    assert found.tokens == pytest.approx(found.tokens_per_s * (1.0 + 0.01 * found.length))
    assert 1 < found.tokens < 5


@pytest.mark.slow
def test_the_page_has_the_verdict_the_curve_and_the_tables() -> None:
    found = forecast(*planted(2), clip=8.0, times=[timed(_1=0.1), timed(_1=0.2), timed(_1=0.2)])
    page = render_page(forecast_report(found))
    assert "doubt chooses as well" not in page
    for text in (found.verdict.split(":")[0], "Right tokens against deferral rate", "assistant-2", "oracle", "enough"):
        assert text in page


def rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"w{i % 20} w{i % 7}", "completion": f"w{i * 3 % 30} w{i % 11} w{i % 5}"} for i in range(count)]


@pytest.mark.slow
def test_the_command_scores_times_and_keeps(
    saved_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", rows(40))
    models = ["--base", str(saved_model("b", 0)), "--assistant", str(saved_model("a", 1, hidden_size=48))]
    asked = ["forecast", *models, "--data", "rows.jsonl", "--rows", "20", "--scores", "kept"]
    done = CliRunner().invoke(app, [*asked, "--json", "--html", "page.html"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["num_examples"] == 20
    assert all(author["pass_ms"] > 0 for author in found["authors"])
    assert found["points"][0]["tokens_per_s"] > 0
    assert found["drafting"]["tokens"] >= 1
    assert found["verdict"] in (tmp_path / "page.html").read_text()
    whole = CliRunner().invoke(app, [*asked[:-4], "--rows", "200", "--scores", "all"])
    assert whole.exit_code == 0, whole.output
    options: dict[str, Any] = {"calibrate": False, "cache_hidden_states": True, "scores": str(tmp_path / "all")}
    config = RunConfig(base=models[1], assistant=[models[3]], data="rows.jsonl", **options)
    prepared = encode_for(config.base_model, config.assistants, [config.load("rows.jsonl", None)], config, 2048)
    score_run(config, prepared, tmp_path, [*config.authors])  # as training does: it finds them
    again = CliRunner().invoke(app, ["forecast", "--scores", "kept"])
    assert again.exit_code == 0, again.output
    for text in ("80 gold tokens of 20 examples", "best author", "assistant only", "pseudo-labels give"):
        assert text in again.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "rows.jsonl"], "expected --base, --assistant and --data; or --scores SCORES of a run"),
        (["--rows", "4"], "greater than or equal to 5"),
        (["--scores", "kept", "--rows", "9"], "without --base nothing is scored; leave --rows out"),
    ],
)
def test_what_is_missing_is_named(arguments: list[str], complaint: str) -> None:
    done = CliRunner().invoke(app, ["forecast", *arguments])
    assert done.exit_code == 2
    assert complaint in " ".join(done.stderr.replace("\u2502", " ").split())


@pytest.mark.slow
def test_segments_are_forecast_without_speeds(tmp_path: Path) -> None:
    names = []
    for name, tokenizer in zip(("b", "a"), two_tokenizers(), strict=True):
        names.append(str(tmp_path / name))
        writing_model(tokenizer, 1).save_pretrained(names[-1])
        tokenizer.save_pretrained(names[-1])
    words = TEXTS[0].split()
    texts = [{"prompt": words[i], "completion": f" {words[i + 1]} {words[i + 2]}"} for i in range(12)]
    write_rows(tmp_path / "rows.jsonl", texts)
    options: dict[str, Any] = {"calibrate": False, "cache_hidden_states": True, "device": "cpu"}
    config = RunConfig(base=names[0], assistant=[names[1]], data=str(tmp_path / "rows.jsonl"), **options)
    found = forecast_run(config, rows=10, max_length=64, clip=8.0)
    assert (found.unit, found.num_examples) == ("segments", 10)
    assert found.drafting is found.points[0].tokens_per_s is None
    assert DOUBT in found.minus
