"""Metrics: what counts as right, that scores stay in [0, 1], and what a user's own metric may not do."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collm.errors import ConfigError
from collm.evaluation.metrics import (
    METRICS,
    contains,
    exact_match,
    last_number,
    metric_named,
    numbers_in,
    suitable_metric,
    token_f1,
)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@given(prediction=st.text(), reference=st.text())
def test_scores_are_shares(metric, prediction, reference):
    assert 0 <= metric(prediction, reference) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact_match", "contains", "token_f1"])
@given(text=st.text())
def test_a_text_matches_itself(name, text):
    assert METRICS[name](text, text) == 1


@given(prediction=st.text(), reference=st.text())
def test_f1_is_symmetric(prediction, reference):
    assert token_f1(prediction, reference) == token_f1(reference, prediction)


@given(value=st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_last_number_sees_the_value_not_the_spelling(value):
    assert last_number(f"First 17, then the answer: {value:,f}.", f"#### {value:f}") == 1
    assert last_number(f"The answer: {value:,f}.", f"#### {value + 1:f}") == 0


@pytest.mark.parametrize(
    ("metric", "prediction", "reference", "score"),
    [
        (exact_match, " The  capital\nis Paris. ", "The capital is Paris.", 1),
        (exact_match, "cafe\u0301", "caf\u00e9", 1),  # the same text, composed or not
        (exact_match, "paris", "Paris", 0),
        (exact_match, "", "Paris", 0),
        (contains, "It is in Niger.", "Niger", 1),
        (contains, "It is in Nigeria.", "Niger", 0),
        (contains, "42 and 17", "4", 0),
        (contains, "the New\n York", "New York", 1),
        (contains, "首都は東京です", "東京", 1),  # no spaces between words: no border to ask for
        (contains, "up 12% today", "12%", 1),
        (contains, "f(x)=2", "(x)", 1),
        (contains, "Paris", "It is Paris", 0),
        (contains, "anything", "", 0),
        (contains, " ", "", 1),
        (last_number, "It costs $1,200.00.", "#### 1200", 1),
        (last_number, "that is 50%", "50", 1),
        (last_number, "-$5", "$-5", 1),
        (last_number, "\u22125", "-5", 1),
        (last_number, "5-3", "3", 1),
        (last_number, "about .5", "0.50", 1),
        (last_number, "1e3", "1000", 1),
        (last_number, "lists 1,2345", "2345", 1),
        (last_number, "0.30000000000000004", "0.3", 0),  # equal only if rounded
        (last_number, "9007199254740993", "9007199254740992", 0),  # equal as floats
        (last_number, "7 of 12", "7", 0),
        (last_number, "no idea", "7", 0),
        (last_number, "7", "no idea", 0),
        (last_number, "none", "none", 0),
        (token_f1, "...", "word", 0),
    ],
)
def test_what_counts_as_right(metric, prediction, reference, score):
    assert metric(prediction, reference) == score


def test_numbers_are_in_order_and_exact():
    assert numbers_in("-$1,200.50, then 3 or .5") == [Decimal("-1200.5"), Decimal(3), Decimal("0.5")]
    assert numbers_in("none") == []


def test_f1_counts_words_with_their_multiplicity():
    assert token_f1("Paris, paris!", "Paris is nice") == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))


def test_metrics_have_names_and_an_unknown_one_lists_them():
    assert metric_named("exact_match") is exact_match
    with pytest.raises(ConfigError, match=r"'accuracy'.*exact_match, contains, last_number, token_f1"):
        metric_named("accuracy")


@pytest.mark.parametrize(
    ("references", "metric"),
    [
        (["so it is 12 + 3 = 15", "#### 1,200.50", "$5.", "about 50%"], "last_number"),
        (["15"] * 9 + ["fifteen"], "last_number"),
        (["15", "fifteen"], "exact_match"),
        (["w1", "version2"], "exact_match"),  # no numbers
        (["Paris", "New York"], "token_f1"),
        (["19.3 km, two days on foot."], "token_f1"),
    ],
)
def test_the_default_suits_the_completions(references, metric):
    assert suitable_metric(references) == metric


@pytest.fixture
def own_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metrics.py").write_text(
        "def same_length(prediction, reference): return len(prediction) == len(reference)\n"
        "def distance(prediction, reference): return abs(len(prediction) - len(reference))\n"
        "def undefined(prediction, reference): return float('nan')\n"
        "def spelled(prediction, reference): return '1'\n"
        "def of_one(prediction): return 1\n"
        "def of_objects(prediction, reference): return prediction['text'] == reference\n"
        "number = 3\n"
    )
    (tmp_path / "broken_metrics.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own_metrics")
class TestOwnMetric:
    def test_is_imported_and_scores_as_float(self):
        metric = metric_named("own_metrics:same_length")
        assert [metric("ab", "cd"), metric("ab", "c")] == [1.0, 0.0]
        assert type(metric("ab", "cd")) is float

    @pytest.mark.parametrize("name", ["distance", "undefined", "spelled"])
    def test_must_return_a_share(self, name):
        with pytest.raises(ConfigError, match=f"own_metrics:{name}' returned .* from 0 to 1"):
            metric_named(f"own_metrics:{name}")("abc", "")

    def test_that_raises_is_one_sentence(self):
        with pytest.raises(ConfigError, match=r"of_objects' raised TypeError: .*, for the prediction 'abc'$"):
            metric_named("own_metrics:of_objects")("abc", "")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("no_such_module:f", "ModuleNotFoundError.*PYTHONPATH"),
            ("broken_metrics:f", "ZeroDivisionError"),
            ("own_metrics:absent", "no such name"),
            ("own_metrics:number", "is a int, expected a function metric.prediction: str, reference: str."),
            ("own_metrics:of_one", r"takes .prediction., expected a function metric.prediction: str, reference: str."),
            (":f", "cannot be imported"),
        ],
    )
    def test_that_is_none_is_refused(self, name, reason):
        with pytest.raises(ConfigError, match=reason):
            metric_named(name)
