"""The cost model: its equation, its caches, and the simulation between what it may not go below nor above."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import simulate as page
from benchmarks.servers.cost import Call, Job, Server, alone, calibrated, collaboration, seconds, token_by_token
from benchmarks.servers.simulation import simulate
from benchmarks.servers.workload import Verdict, Workload, scattered, verdict
from collm.errors import ConfigError

ROOT = Path(__file__).parents[2]
SOME_S = st.floats(0.001, 10)
PERHAPS_S = st.just(0.0) | SOME_S
SERVERS = st.builds(
    Server,
    PERHAPS_S,
    SOME_S,
    PERHAPS_S,
    PERHAPS_S,
    PERHAPS_S,
    PERHAPS_S,
    PERHAPS_S,
    st.integers(1, 5),
    st.integers(1, 9),
)
PAIRS = st.tuples(SERVERS, SERVERS).map(list)
AUTHORS = st.lists(st.integers(0, 1), min_size=1, max_size=30)
PROMPT = st.integers(1, 20)
BASE = Server(round_trip_s=0.5, step_s=1.0, step_per_sequence_s=0.01, prefill_s_per_token=0.01)
ASSISTANT = Server(round_trip_s=0.5, step_s=5.0, step_per_sequence_s=0.05, prefill_s_per_token=0.05)


def equation(authors: list[int], prompt: int, servers: list[Server]) -> float:
    """(1) of the module, from counts alone."""
    base, assistant = servers
    deferred = [place for place, author in enumerate(authors, start=prompt) if author]  # length of the text there
    count = len(deferred)
    resumed = [length for length in deferred if length + 1 < prompt + len(authors)]
    unread = [0.0, 0.0]
    unread[0] = prompt - 1 + sum(length % base.block_tokens for length in resumed)
    seen = 0
    for length in deferred:
        unread[1] += length - seen // assistant.block_tokens * assistant.block_tokens - 1
        seen = length
    return (
        len(authors) * base.step(1)
        + count * assistant.step(1)
        + (1 + len(resumed)) * (base.round_trip_s + base.handling_s + base.prefill_s)
        + count * (assistant.round_trip_s + assistant.handling_s + assistant.prefill_s)
        + base.prefill_s_per_token * unread[0]
        + assistant.prefill_s_per_token * unread[1]
    )


def jobs_of(texts: list[list[int]], prompt: int, servers: list[Server]) -> list[Job]:
    return [collaboration(authors, prompt, servers) for authors in texts]


# One sequence


@settings(deadline=None)
@given(AUTHORS, PROMPT, PAIRS)
def test_requests_add_up_to_the_equation(authors: list[int], prompt: int, servers: list[Server]) -> None:
    assert seconds(collaboration(authors, prompt, servers), servers) == pytest.approx(
        equation(authors, prompt, servers)
    )


@settings(deadline=None)
@given(AUTHORS, PROMPT, PAIRS)
def test_a_completion_alone_takes_what_the_equation_says(
    authors: list[int], prompt: int, servers: list[Server]
) -> None:
    for job in (
        collaboration(authors, prompt, servers),
        token_by_token(authors, prompt, servers, 50),
        alone(1, len(authors), prompt),
    ):
        outcome = simulate([job], servers, 1)
        assert outcome.seconds == pytest.approx(seconds(job, servers))
        assert outcome.s_per_token == pytest.approx(outcome.seconds / len(authors))


@given(AUTHORS, PROMPT, PAIRS, SOME_S)
def test_a_longer_way_costs_its_length_at_each_request(
    authors: list[int], prompt: int, servers: list[Server], longer_s: float
) -> None:
    job = collaboration(authors, prompt, servers)
    farther = [replace(server, round_trip_s=server.round_trip_s + longer_s) for server in servers]
    expected = seconds(job, servers) + longer_s * len(job.calls)
    assert simulate([job], farther, 1).seconds == pytest.approx(expected)


@given(AUTHORS, PROMPT, PAIRS)
def test_two_requests_for_each_deferral_and_one_more(authors: list[int], prompt: int, servers: list[Server]) -> None:
    calls = collaboration(authors, prompt, servers).calls
    assert len(calls) == 2 * sum(authors) + (authors[-1] == 0)
    assert sum(call.steps for call in calls if call.author == 0) == len(authors)
    assert all(call.steps == 1 for call in calls if call.author == 1)
    asked = token_by_token(authors, prompt, servers, 7).calls
    assert len(asked) == len(authors) + sum(authors)
    assert {call.logprobs for call in asked} == {7}


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), PROMPT, st.lists(SERVERS, min_size=3, max_size=3))
def test_what_is_unread_is_what_a_cache_of_whole_blocks_lacks(
    authors: list[int], prompt: int, servers: list[Server]
) -> None:
    """Against a cache that keeps blocks by the text up to their end, as vLLM's does; two assistants."""
    text = list(range(prompt + len(authors)))  # no token twice
    cached: list[set[int]] = [set() for _ in servers]

    def unread(author: int, length: int, generated: int) -> int:
        block, ends = servers[author].block_tokens, cached[author]
        found = 0
        while found + block <= length - 1 and found + block in ends:
            found += block
        ends |= set(range(block, length + generated - 1 + 1, block))  # the last token generated was not read
        return length - found

    at, expected = prompt, []
    while at < len(text):
        later = [place for place in range(at, len(text)) if authors[place - prompt]]
        end = later[0] if later else len(text)
        steps = end - at + bool(later)
        expected.append(Call(0, unread(0, at, steps), steps))
        if later:
            author = authors[end - prompt]
            expected.append(Call(author, unread(author, end, 1), 1))
        at = end + bool(later)
    assert list(collaboration(authors, prompt, servers).calls) == expected


def test_a_resume_reads_the_last_block_again() -> None:
    servers = [Server(0, 1, block_tokens=32), Server(0, 1)]
    resumed = collaboration([0, 1, 0], 400, servers).calls[-1]
    assert resumed.unread == 402 - 384


# Many at once


@settings(deadline=None)
@given(st.lists(AUTHORS, min_size=1, max_size=6), PROMPT, PAIRS, st.integers(1, 7))
def test_company_costs_no_more_than_turns_and_no_less_than_the_longest(
    texts: list[list[int]], prompt: int, servers: list[Server], concurrency: int
) -> None:
    """And nothing is lost or done twice, and no server works more than all the time."""
    jobs = jobs_of(texts, prompt, servers)
    outcome = simulate(jobs, servers, concurrency)
    turns = [seconds(job, servers) for job in jobs]
    assert max(turns) * (1 - 1e-9) <= outcome.seconds <= sum(turns) * (1 + 1e-9)
    if concurrency == 1:
        assert outcome.seconds == pytest.approx(sum(turns))
    assert outcome.tokens == sum(map(len, texts)) == outcome.steps[0]
    assert outcome.steps[1] == sum(map(sum, texts))
    assert sum(outcome.requests) == sum(len(job.calls) for job in jobs)
    assert all(0 <= busy <= 1 + 1e-9 for busy in outcome.busy)


@settings(deadline=None)
@given(st.lists(AUTHORS, min_size=1, max_size=6), PROMPT, PAIRS, st.integers(1, 7))
def test_no_server_does_more_than_it_can(
    texts: list[list[int]], prompt: int, servers: list[Server], concurrency: int
) -> None:
    """Full steps, reading that is never shared, and HTTP one by one are the best that a server can do."""
    jobs = jobs_of(texts, prompt, servers)
    taken = simulate(jobs, servers, concurrency).seconds
    for author, server in enumerate(servers):
        calls = [call for job in jobs for call in job.calls if call.author == author]
        together = min(server.max_batch, concurrency)
        steps = sum(call.steps for call in calls) * server.step(together) / together
        assert taken >= (steps + sum(map(server.reading, calls))) * (1 - 1e-9)
        assert taken >= sum(map(server.handling, calls)) * (1 - 1e-9)


@settings(deadline=None)
@given(st.lists(AUTHORS, min_size=1, max_size=6), PROMPT, PAIRS, st.integers(1, 7), st.integers(1, 3))
def test_a_machine_does_no_more_than_its_cores_can(
    texts: list[list[int]], prompt: int, servers: list[Server], concurrency: int, cores: int
) -> None:
    """Shared cores take from one another, never from a completion that has them for itself."""
    jobs = jobs_of(texts, prompt, servers)
    shared = simulate(jobs, servers, concurrency, cores)
    turns = sum(seconds(job, servers) for job in jobs)
    steps = [sum(call.steps for job in jobs for call in job.calls if call.author == author) for author in (0, 1)]
    least = 0.0
    for job in jobs:
        least += sum(servers[call.author].handling(call) + servers[call.author].reading(call) for call in job.calls)
    for server, count in zip(servers, steps, strict=True):
        together = min(server.max_batch, concurrency)
        least += count * server.step(together) / together
    assert least / cores * (1 - 1e-9) <= shared.seconds <= turns * (1 + 1e-9)
    if concurrency == 1:
        assert shared.seconds == pytest.approx(turns)


def test_two_models_on_one_core_take_turns() -> None:
    servers = [Server(0, step_s=1), Server(0, step_s=1)]
    jobs = [alone(0, 10, 1), alone(1, 10, 1)]
    assert simulate(jobs, servers, 2).seconds == pytest.approx(10)
    assert simulate(jobs, servers, 2, cores=1).seconds == pytest.approx(20)
    assert simulate(jobs, servers, 2, cores=2).seconds == pytest.approx(10)


def test_cores_for_all_are_as_good_as_no_sharing() -> None:
    servers = [replace(BASE, handling_s=0.123), replace(ASSISTANT, handling_s=0.0456)]
    texts = Workload(12, 30, 10, 5, rate=0.3).texts()
    jobs = jobs_of(texts, 10, servers)
    alike = [simulate(jobs, servers, 5, cores) for cores in (4, 400, float("inf"))]  # two processes for each server
    assert [one.seconds for one in alike] == pytest.approx([alike[0].seconds] * 3)
    assert simulate(jobs, servers, 5, 2).seconds > alike[0].seconds


def test_a_step_serves_as_many_as_are_there() -> None:
    servers = [Server(0, step_s=1, step_per_sequence_s=0.5, max_batch=4), ASSISTANT]
    jobs = [alone(0, 10, 1)] * 8
    assert simulate(jobs, servers, 4).seconds == pytest.approx(2 * 10 * 3)
    assert simulate(jobs, servers, 8).seconds == pytest.approx(2 * 10 * 3)  # four wait for a place
    assert simulate(jobs, servers, 2).seconds == pytest.approx(4 * 10 * 2)
    assert simulate(jobs, servers, 4).busy == (pytest.approx(1), 0)


def test_the_whole_vocabulary_holds_up_a_server() -> None:
    servers = [Server(0, step_s=1, logprob_s=0.5, max_batch=8), ASSISTANT]
    jobs = [token_by_token([0] * 5, 1, servers, 100)] * 4
    assert simulate(jobs, servers, 4).seconds > 4 * 5 * 100 * 0.5
    assert simulate(jobs_of([[0] * 5] * 4, 1, servers), servers, 4).seconds == pytest.approx(5)


@settings(deadline=None)
@given(PAIRS, st.integers(1, 6), st.integers(1, 20), PROMPT, st.integers(1, 7))
def test_without_deferrals_the_base_is_alone(
    servers: list[Server], completions: int, tokens: int, prompt: int, concurrency: int
) -> None:
    workload = Workload(completions, tokens, prompt, concurrency, rate=0)
    together = workload.together(*servers)
    assert together == workload.by(0, *servers)
    assert together.requests == (completions, 0)


def test_nothing_to_do_is_refused() -> None:
    for jobs, concurrency in (([], 1), ([alone(0, 0, 1)], 1), ([alone(0, 1, 0)], 1), ([alone(0, 1, 1)], 0)):
        with pytest.raises(ConfigError, match="expected at least one completion at once"):
            simulate(jobs, [BASE, ASSISTANT], concurrency)


# Workloads and verdicts


@given(st.integers(0, 60), st.integers(0, 60), st.data())
def test_runs_are_placed_as_asked(deferrals: int, kept: int, data: st.DataObject) -> None:
    runs = data.draw(st.integers(min(deferrals, 1), min(deferrals, kept + 1)))
    authors = scattered(deferrals + kept, deferrals, runs, random.Random(0))
    assert len(authors) == deferrals + kept
    assert sum(authors) == deferrals
    assert sum(b > a for a, b in zip([0, *authors], authors, strict=False)) == runs


@pytest.mark.parametrize(("tokens", "deferrals", "runs"), [(5, 6, 1), (5, 3, 0), (5, 0, 1), (5, 3, 4), (5, 4, 3)])
def test_what_cannot_be_placed_is_refused(tokens: int, deferrals: int, runs: int) -> None:
    with pytest.raises(ConfigError, match=f"{tokens} tokens cannot hold {deferrals} deferrals in {runs} runs"):
        scattered(tokens, deferrals, runs, random.Random(0))


@pytest.mark.parametrize("run", [None, 1, 4])
def test_a_workload_defers_at_its_rate(run: float | None) -> None:
    texts = Workload(8, 50, 10, 1, rate=0.25, run=run).texts()
    assert [len(text) for text in texts] == [50] * 8
    assert sum(map(sum, texts)) == 100


@pytest.mark.parametrize("changes", [{"rate": 1.1}, {"rate": -0.1}, {"rate": 0.5, "run": 0.5}])
def test_a_workload_that_cannot_be_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected a share and a length"):
        Workload(8, 50, 10, 1, **changes).texts()  # type: ignore[arg-type]


def test_the_verdict_at_one_is_equation_two() -> None:
    told = verdict(Workload(16, 100, 1, 1, rate=0), BASE, ASSISTANT)
    b, a = BASE, ASSISTANT
    half = (b.block_tokens - 1) / 2 * (b.prefill_s_per_token + a.prefill_s_per_token)
    about = (a.step(1) - b.step(1) - a.prefill_s_per_token) / (a.step(1) + b.round_trip_s + a.round_trip_s + half)
    assert told.rate == pytest.approx(about, abs=0.02)
    assert f"from a deferral rate of {told.rate:.2f} on" in str(told)
    for rate, wins in ((told.rate - 0.05, True), (told.rate + 0.05, False)):  # type: ignore[operator]
        workload = Workload(16, 100, 1, 1, rate)
        assert (workload.together(b, a).tokens_per_s > workload.by(1, b, a).tokens_per_s) is wins


def test_the_assistant_alone_wins_sooner_in_company_and_over_longer_ways() -> None:
    def rate(base: Server, assistant: Server, concurrency: int) -> float:
        told = verdict(Workload(64, 64, 64, concurrency, rate=0), base, assistant).rate
        assert told is not None
        return told

    far = [replace(server, round_trip_s=3.0) for server in (BASE, ASSISTANT)]
    assert rate(BASE, ASSISTANT, 16) < rate(BASE, ASSISTANT, 4) < rate(BASE, ASSISTANT, 1)
    assert rate(far[0], far[1], 1) < rate(BASE, ASSISTANT, 1)


def test_a_verdict_may_be_always_or_never() -> None:
    slow = replace(BASE, step_s=10.0)
    assert verdict(Workload(4, 20, 1, 1, rate=0), slow, ASSISTANT) == Verdict(0.0, 1)
    assert "at every deferral rate" in str(Verdict(0.0, 1))
    full = Server(round_trip_s=0, step_s=5.0, max_batch=2)  # five completions fill it for longer token by token
    quick = Server(round_trip_s=0, step_s=0.001)
    assert verdict(Workload(5, 20, 1, 5, rate=0), quick, full) == Verdict(None, 5)
    assert "faster than the assistant alone at every" in str(Verdict(None, 4))


# Measurements


def measurements(server: Server, sizes: Sequence[int] = (1, 4, 8)) -> dict[str, Any]:
    """What would be measured of a server."""
    once = Job(1, (Call(0, 1, 1),))
    return {
        "round_trip_s": seconds(once, [server]),
        "prefill_s_per_token": server.prefill_s_per_token,
        "step_s_at_batch": {str(size): server.step(size) for size in sizes},
    }


@given(SERVERS)
def test_a_server_is_found_again_from_its_measurements(server: Server) -> None:
    server = replace(server, prefill_s=0.0, logprob_s=0.0)
    found = calibrated({**measurements(server), "max_batch": 3, "block_tokens": 32})
    assert found.step(5) == pytest.approx(server.step(5))
    assert found.round_trip_s + found.handling_s == pytest.approx(server.round_trip_s + server.handling_s, abs=1e-9)
    assert (found.max_batch, found.block_tokens, found.handling_s) == (3, 32, 0)


def test_requests_per_second_become_time_in_which_no_other_is_handled() -> None:
    server = replace(BASE, round_trip_s=0.0, handling_s=0.5)
    found = calibrated({**measurements(server), "requests_per_s": 4})
    assert (found.round_trip_s, found.handling_s) == (pytest.approx(0.25), pytest.approx(0.25))
    assert calibrated({**measurements(server), "requests_per_s": 1}).round_trip_s == pytest.approx(0)


@pytest.mark.parametrize(
    ("steps", "at_one", "at_ten"),
    [({"1": 2.0, "4": 1.0}, 1.5, 1.5), ({"1": 1.0, "2": 3.0}, 7 / 5, 14.0), ({"1": 1.0, "3": 2.0, "5": 3.0}, 1.0, 5.5)],
    ids=["noise falls", "through zero", "line"],
)
def test_a_step_is_never_less_than_nothing(steps: dict[str, float], at_one: float, at_ten: float) -> None:
    found = calibrated({"round_trip_s": 9.0, "prefill_s_per_token": 0.0, "step_s_at_batch": steps})
    assert (found.step(1), found.step(10)) == (pytest.approx(at_one), pytest.approx(at_ten))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round_trip_s": 0.1}, "expected the request to take longer"),
        ({"step_s_at_batch": {"1": 1.0}}, "at least two"),
        ({"step_s_at_batch": {"one": 1.0}}, "cannot be read"),
        ({"round_trip_s": None}, "cannot be read"),
        ({"prefill": 1.0}, "'prefill', expected any of block_tokens"),
        ({"prefill_s_per_token": -1.0}, "prefill_s_per_token is -1.0"),
        ({"block_tokens": 0}, "expected more than 0 for each"),
    ],
)
def test_measurements_that_say_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrated({**measurements(BASE), **changes})


# The page

CASE = {"name": "one", "completions": 3, "tokens": 100, "deferrals": 20, "runs": 10, "concurrency": 2, "requests": 43}


def test_the_page_of_measurements(tmp_path: Path) -> None:
    servers = [BASE, ASSISTANT]
    taken = simulate(page.jobs({**CASE, "wall_s": 0}, servers), servers, 2).seconds
    without = {key: value for key, value in CASE.items() if key not in ("deferrals", "runs")}
    others = [
        {**without, "name": "assistant", "method": "assistant alone", "requests": 3},
        {**CASE, "name": "whole", "method": "token by token", "vocab_size": 32, "requests": 120, "prompt_tokens": 5},
    ]
    content = {
        "command": "made up",
        "servers": {"base": measurements(BASE), "assistant": measurements(ASSISTANT)},
        "cases": [{**case, "wall_s": taken / 2} for case in (CASE, *others)],
    }
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(content))
    command = [sys.executable, "-m", "benchmarks.simulate", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    header, _, *rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert header[:4] == ["case", "measured, s", "predicted, s", "predicted / measured"]
    assert [row[0] for row in rows] == ["one", "assistant", "whole"]
    assert rows[0][3] == "2.00"
    assert [row[4] == row[5] for row in rows[1:]] == [True, True]
    assert 40 <= int(rows[0][5]) <= 43
    sentences = [line for line in done.stdout.splitlines() if "assistant alone" in line]
    assert len(sentences) == len(page.AT_ONCE)


@pytest.mark.soak
def test_the_table_of_the_document_is_what_the_command_prints() -> None:
    assert "\n".join(page.assumed()) in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "guess"}, "method is 'guess'"),
        ({"runs_": 3}, "has the unknown field 'runs_'"),
        ({"method": "token by token"}, "lacks 'vocab_size'"),
        ({"method": "assistant alone"}, "has the unknown field 'deferrals'"),
    ],
)
def test_a_case_that_says_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        page.jobs({**CASE, "wall_s": 1.0, **changes}, [BASE, ASSISTANT])
