"""Draws from logits: the argmax and its log-probability, what comes along, what is broken, how often what is drawn."""

from __future__ import annotations

import math

import pytest
import torch

from collm.core.params import SamplingParams
from collm.core.sampling import token_probs
from collm.engine.decision import Draw
from collm.engine.reader import draw_tokens


def greedy_draws(logits: torch.Tensor, *others: torch.Tensor) -> tuple[list[Draw], list[list[float]]]:
    count = len(logits)
    return draw_tokens(logits, [SamplingParams(temperature=0.0)] * count, [0.0] * count, *others, raw=logits)


def sampled_draw(logits: torch.Tensor, params: SamplingParams, uniform: float) -> Draw:
    row = logits.unsqueeze(0)
    return draw_tokens(row, [params], [uniform], raw=row)[0][0]


LOGITS = 2 * torch.randn(5, 13, generator=torch.Generator().manual_seed(3))


def test_greedy_draws_are_the_argmax_and_its_log_probability() -> None:
    draws, others = greedy_draws(LOGITS)
    logprobs = torch.log_softmax(LOGITS, -1)
    assert [draw.token_id for draw in draws] == LOGITS.argmax(-1).tolist()
    assert [draw.logprob for draw in draws] == pytest.approx(logprobs.amax(-1).tolist(), abs=1e-5)
    assert not any(math.isnan(draw.logprob) for draw in draws)
    assert others == [[]] * 5


def test_further_columns_come_back_row_by_row_in_order() -> None:
    pair, single = torch.arange(10.0).view(5, 2), torch.arange(100.0, 105.0).view(5, 1)
    draws, others = greedy_draws(LOGITS, pair, single)
    assert draws == greedy_draws(LOGITS)[0]
    assert others == [[2.0 * row, 2.0 * row + 1, 100.0 + row] for row in range(5)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_distribution_is_broken_and_its_neighbours_are_not(bad: float) -> None:
    logits = LOGITS.clone()
    logits[2] = bad
    logits[4, 7] = math.nan
    draws, _ = greedy_draws(logits)
    assert [math.isnan(draw.logprob) for draw in draws] == [False, False, True, False, True]
    whole, _ = greedy_draws(LOGITS)
    assert [draws[row] for row in (0, 1, 3)] == [whole[row] for row in (0, 1, 3)]
    assert math.isnan(sampled_draw(logits[2], SamplingParams(temperature=1.0), 0.5).logprob)


def test_tokens_that_are_ruled_out_break_nothing() -> None:
    logits = torch.full((1, 4), -torch.inf)
    logits[0, 1:3] = 0.0
    draws, _ = greedy_draws(logits)
    assert draws[0].token_id == 1
    assert draws[0].logprob == pytest.approx(math.log(0.5))
    drawn = {sampled_draw(logits[0], SamplingParams(temperature=1.0), uniform).token_id for uniform in (0, 0.4, 0.6)}
    assert drawn == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(temperature=1.0, top_k=3),
    ],
)
def test_sampled_draws_share_the_unit_interval_by_probability(params: SamplingParams) -> None:
    """Each token owns one interval of uniforms, so a grid of 400 counts it to within one point at either end."""
    logits, points = LOGITS[0], 400
    draws = [sampled_draw(logits, params, (point + 0.5) / points) for point in range(points)]
    token_ids = [draw.token_id for draw in draws]
    expected = token_probs(logits, params.temperature, params.top_p, params.top_k).tolist()
    for token_id, prob in enumerate(expected):
        assert abs(token_ids.count(token_id) / points - prob) <= 1.001 / points
        assert prob > 0 or token_id not in token_ids


def test_the_log_probability_of_a_sampled_token_is_that_before_temperature_and_truncation() -> None:
    params = SamplingParams(temperature=0.5, top_k=4)
    logprobs = torch.log_softmax(LOGITS[1], -1).tolist()
    for uniform in (0.0, 0.3, 0.6, 0.99):
        draw = sampled_draw(LOGITS[1], params, uniform)
        assert draw.logprob == pytest.approx(logprobs[draw.token_id], abs=1e-5)
