"""What users do with a collaboration, from building it to checking what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from collm import CoLLM, SamplingParams
from collm.core.calibration import CalibrationOptions
from collm.core.named import name_of
from collm.core.policies import ThresholdPolicy
from collm.core.types import Completion
from collm.errors import CollmError, ModelFailure
from collm.evaluation.answers import read_answers
from collm.evaluation.compare import Evaluation, compare
from collm.evaluation.harness import HarnessLM
from collm.evaluation.report import render_page
from collm.evaluation.run_report import report_of
from collm.evaluation.systems import systems_named
from collm.evaluation.tasks import task_named
from collm.evaluation.tasks.task import TaskItem
from collm.run.calibrate import calibrate_on
from collm.serving.settings import Settings
from collm.training.data import Row
from collm.vllm.connections import Connections
from collm.vllm.servers import Servers
from tests.crossings.cases import POISON, PROMPTS, THRESHOLD, Asked, Case
from tests.crossings.running import ask_http, before_work, decode, leave_http, prepare, stream
from tests.crossings.world import World, check
from tests.serving.conftest import Running, open_slots
from tests.two_tokenizers import two_tokenizers
from tests.vllm.fake import FakeVllm, Served, refusal
from tests.vllm.test_one_engine import FakeEngine


def run(world: World, case: Case, tmp_path: Path, patch: pytest.MonkeyPatch, stack: ExitStack) -> None:
    """Build, prepare, use and check."""
    with before_work():
        model = build(world, case, tmp_path, stack)
    prepare(model, case, patch)
    if "calibrate" in case.steps:
        calibrated(world, model, case, tmp_path / "collaboration")
    if "serve" in case.steps:
        over_http(world, model, case)
    elif case.steps & {"eval", "resume"}:
        evaluated(world, model, case, tmp_path / "out", patch)
    elif "lm-eval" in case.steps:
        harnessed(world, model, case)
    else:
        streams = case.ways >= {"stream"} and case.ways <= {"stream", "cancel"}
        found = stream(model, case) if streams else decode(model, case)
        if model.servers is not None:
            assert [one.token_ids for one in decode(model, case)] == [one.token_ids for one in found]
        check(world, case, [(prompt, params) for prompt in case.prompts for params in case.params], found)


def build(world: World, case: Case, tmp_path: Path, stack: ExitStack) -> CoLLM:
    members = world.members(case)
    path = tmp_path / "collaboration"
    if "save and load" in case.steps:
        members.model().save_pretrained(path)
    where: dict[str, Any] = {}
    if case.steps & {"servers", "one engine"}:
        serve = engine_of if "one engine" in case.steps else servers_of
        fakes = [stack.enter_context(fake) for fake in serve(world, case)]
        if "failing neighbour" in case.ways:
            (poison,) = two_tokenizers()[0](POISON)["input_ids"]
            for fake in fakes:
                fake.always = lambda body: refusal(400, "poison") if poison in body["prompt"] else None
        where["servers"] = Servers([fake.url for fake in fakes], timeout_s=20.0)
    model = CoLLM.from_pretrained(path, **where) if "save and load" in case.steps else members.model(**where)
    stack.callback(lambda: [one.close() for one in vars(model.backend).values() if isinstance(one, Connections)])
    return model


def servers_of(world: World, case: Case) -> list[FakeVllm]:
    """One for each author."""
    members = world.members(case)
    exported = world.folder / f"export {case.members}"
    if not exported.exists():
        members.model().export_vllm(exported)
    served = [Served.exported(exported)]
    served += [
        Served(*author)
        for author in zip(members.slow[1 : 1 + case.models], members.tokenizers[1 : 1 + case.models], strict=True)
    ]
    served += [served[0]] * case.tools  # nobody asks it
    return [FakeVllm(one, pieces=(1, 3, 2), max_model_len=512) for one in served]


def engine_of(world: World, case: Case) -> list[FakeVllm]:
    """One that holds base and assistant."""
    members = world.members(case)
    assistants = [*members.slow[1 : 1 + case.models], *members.assistants[case.models :]]
    pair = CoLLM(members.base, assistants, members.head, members.tokenizers[0], tokenizers=members.tokenizers[1:])
    return [FakeEngine(pair, pieces=(1, 3, 2), max_model_len=512)]


def seeded(case: Case) -> list[Asked]:
    """The prompts as an evaluation asks them: with a seed, prompt i has the seed + i."""
    (params,) = case.params
    return [
        (prompt, params if params.seed is None else replace(params, seed=params.seed + i))
        for i, prompt in enumerate(case.prompts)
    ]


def calibrated(world: World, model: CoLLM, case: Case, saved: Path) -> None:
    prompts = [*case.prompts, POISON] if "failing neighbour" in case.ways else case.prompts
    rows = [Row(prompt, "the river", None, prompt) for prompt in map(str, prompts)]
    options = CalibrationOptions("token_f1", rates=[0.5], refine=0)
    options.params = case.params[0]
    if "failing neighbour" in case.ways:
        with pytest.raises(ModelFailure):
            calibrate_on(model, rows, options, source="these", quiet=True)
        assert open_slots(model) == 0
        return
    found = calibrate_on(model, rows, options, source="these", quiet=True)
    assert open_slots(model) == 0
    for point in found.points[:3]:
        out = model.generate(case.prompts, case.params[0], threshold=point.threshold)
        check(world, replace(case, policy=ThresholdPolicy(point.threshold)), seeded(case), out)
        authors = [author for one in out for author in one.authors]
        assert point.deferral_rate == pytest.approx(sum(author != 0 for author in authors) / len(authors))
    if saved.exists():
        model.save_calibration(saved)
        assert CoLLM.from_pretrained(saved).calibration == found


def evaluated(world: World, model: CoLLM, case: Case, out: Path, patch: pytest.MonkeyPatch) -> None:
    threshold = case.policy.threshold if isinstance(case.policy, ThresholdPolicy) else THRESHOLD
    name = "collaboration" if isinstance(case.policy, ThresholdPolicy) else str(name_of(case.policy))
    params = SamplingParams(**{**case.options, "seed": None, "stop": ()})
    prompts = [*case.prompts, POISON] if "failing neighbour" in case.ways else case.prompts
    items = [TaskItem(str(i), str(prompt), "the", f"line {i}") for i, prompt in enumerate(prompts)]
    task = task_named("rows", metric="token_f1", max_tokens=12, stop=case.options.get("stop", ()))

    def ask() -> None:
        try:
            systems = systems_named(model, ["base", name], ThresholdPolicy(threshold))
            seed = case.options.get("seed", 0)
            compare(systems, Evaluation(task, items, params, max_batch=2, seed=seed), out)
        except CollmError as error:
            assert not (out / "results.json").exists()
            if (out / "answers").exists():
                raise
            with before_work():
                raise error

    if "resume" in case.steps:
        scored, score = list[str](), type(task).score

        def dies(self: Any, item: TaskItem, text: str) -> Any:
            scored.append(item.id)
            if len(scored) == 2:
                raise KeyboardInterrupt
            return score(self, item, text)

        with patch.context() as once:
            once.setattr(type(task), "score", dies)
            with pytest.raises(KeyboardInterrupt):
                ask()
        assert open_slots(model) == 0
    if "failing neighbour" in case.ways:
        with pytest.raises(ModelFailure):
            ask()
        assert open_slots(model) == 0
        return
    ask()
    assert open_slots(model) == 0
    assert name in render_page(report_of(out))
    answers = read_answers(out, name)
    found = [
        Completion(one.token_ids, one.token_texts, one.authors, one.defer_probs, [], "length", [])
        for one in (answers[item.id] for item in items)
    ]
    check(world, case, seeded(case), found)


def harnessed(world: World, model: CoLLM, case: Case) -> None:
    with before_work():
        if isinstance(case.policy, ThresholdPolicy):
            harness = HarnessLM(model, threshold=case.policy.threshold, batch_size=2)
        else:
            harness = HarnessLM(model, policy=name_of(case.policy), batch_size=2)
        if model.alignment is not None:
            model.policy(harness.policy)
    options = {"until": list(case.options.get("stop", ())), "max_gen_toks": 12}
    ask: Callable[..., Any] = lambda prompts: harness.generate_until(  # noqa: E731
        [Instance("generate_until", {}, (prompt, options), i) for i, prompt in enumerate(prompts)], disable_tqdm=True
    )
    if "failing neighbour" in case.ways:
        with pytest.raises(ModelFailure):
            ask([*PROMPTS, POISON])
        assert open_slots(model) == 0
        return
    completions = model.generate(list(PROMPTS), case.params[0], policy=case.policy)
    check(world, case, seeded(case), completions)
    assert ask(PROMPTS) == [one.text for one in completions]
    if isinstance(case.policy, ThresholdPolicy) and model.alignment is None:
        pairs = [(prompt, " river") for prompt in PROMPTS]
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        for (logprob, _), (context, continuation) in zip(
            harness.loglikelihood(asked, disable_tqdm=True), pairs, strict=True
        ):
            whole, begun = (model.tokenizer(text)["input_ids"] for text in (context + continuation, context))
            logprobs = world.prompt_logprobs(case, whole)
            assert logprob == pytest.approx(sum(logprobs[len(begun) - 1 :]), abs=1e-4)
    assert open_slots(model) == 0


def over_http(world: World, model: CoLLM, case: Case) -> None:
    running = Running({"m": model}, Settings(max_batch=8)).start()
    try:
        with ThreadPoolExecutor(8) as pool:
            replies = [pool.submit(ask_http, running, case, prompt) for prompt in case.prompts]
            if "failing neighbour" in case.ways:
                failed = pool.submit(ask_http, running, case, POISON)
            if "cancel" in case.ways:
                pool.submit(leave_http, running, case).result()
        found = [one for reply in replies for one in reply.result()]
        if "failing neighbour" in case.ways:
            with pytest.raises(AssertionError, match="500"):
                failed.result()
        running.until(running.idle)
    finally:
        running.stop()
    check(world, case, [(prompt, params) for prompt in case.prompts for params in case.params], found)
