"""Every pair of capabilities that a user can combine works as the slow loops say, or is refused before work begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from collm import CoLLM, DeferralHead, ModelSpec, SamplingParams, ToolSpec
from collm.core.combinations import ContrastivePolicy, MixturePolicy
from collm.core.named import name_of
from collm.core.objective import author_logprobs
from collm.core.params import StructuredOutputs
from collm.core.policies import BudgetPolicy, ConfidencePolicy, JointPolicy, Policy, ThresholdPolicy
from collm.core.types import Completion, PromptLogprob
from collm.errors import CollmError, ModelFailure
from collm.evaluation.answers import read_answers
from collm.evaluation.compare import compare
from collm.evaluation.harness import HarnessLM
from collm.evaluation.page import render_page
from collm.evaluation.run_report import report_of
from collm.evaluation.systems import systems_named
from collm.evaluation.tasks.named import task_named
from collm.evaluation.tasks.task import TaskItem
from collm.models.chats import Chat
from collm.models.loading import load_model
from collm.models.runner import ModelRunner
from collm.models.template import Prompt, PromptTemplate
from collm.models.tools import ToolModel
from collm.run.calibrate import Validation
from collm.serving.settings import Settings
from collm.tools.calls import BuiltInTool
from collm.training.data import Row
from collm.vllm.servers import Servers
from tests.decoding.slow import Reading, slow_decode
from tests.decoding.slow_segments import SlowSegments
from tests.decoding.test_engine import random_head
from tests.serving.conftest import Running, open_slots
from tests.two_tokenizers import two_tokenizers, writing_model
from tests.vllm.fake import FakeVllm, Served, refusal

pytestmark = pytest.mark.soak

THRESHOLD = 0.5
DEFAULT: Policy = ThresholdPolicy(THRESHOLD)
PROMPTS = ("the capital of it", "what is the town", "a small river runs")
POISON = "\x01"  # no model writes it
CHAT = (
    "{% if tools %}{{ tools | tojson }} <tool_call>{name}</tool_call> {% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


Asked = tuple[Prompt, SamplingParams]


@dataclass
class Case:
    """What capabilities amount to when they are combined.

    Attributes:
        models, tools: numbers of assistants.
        strange: the first assistant has another tokenizer.
        options: of `SamplingParams`.
        ways: of running a request.
        steps: of a workflow, in any order.
    """

    models: int = 1
    tools: int = 0
    strange: bool = False
    adapter: bool = False
    quantized: bool = False
    policy: Policy = DEFAULT
    options: dict[str, Any] = field(default_factory=dict)
    n: int = 1
    offers_tools: bool = False
    ways: set[str] = field(default_factory=set)
    steps: set[str] = field(default_factory=set)

    @property
    def members(self) -> tuple[Any, ...]:
        return self.models, self.tools, self.strange, self.adapter, self.quantized

    @property
    def params(self) -> list[SamplingParams]:
        """Of the n completions of a prompt."""
        params = SamplingParams(**{"max_new_tokens": 12, **self.options})
        return [params if params.seed is None else replace(params, seed=params.seed + i) for i in range(self.n)]

    @property
    def prompts(self) -> list[Prompt]:
        if not self.offers_tools:
            return list(PROMPTS)
        return [Chat([{"role": "user", "content": prompt}], TOOLS) for prompt in PROMPTS]


def options(**given: Any) -> Callable[[Case], None]:
    return lambda case: case.options.update(given)


def rule(policy: Policy) -> Callable[[Case], None]:
    return lambda case: setattr(case, "policy", policy)


def way(name: str) -> Callable[[Case], None]:
    return lambda case: case.ways.add(name)


def step(name: str) -> Callable[[Case], None]:
    return lambda case: case.steps.add(name)


def sets(**values: Any) -> Callable[[Case], None]:
    return lambda case: [setattr(case, name, value) for name, value in values.items()] and None


def several(case: Case) -> None:
    case.n = 3
    case.options.setdefault("temperature", 0.8)
    case.options.setdefault("seed", 5)


CAPABILITIES: dict[str, Callable[[Case], None]] = {
    "one assistant": lambda case: None,
    "two assistants": sets(models=2),
    "tool": sets(tools=1),
    "adapter": sets(adapter=True),
    "quantized base": sets(quantized=True),
    "two tokenizers": sets(strange=True),
    "threshold": rule(ThresholdPolicy(0.3)),
    "budget": rule(BudgetPolicy(0.4, 0.3)),
    "joint": rule(JointPolicy()),
    "mixture": rule(MixturePolicy()),
    "confidence": rule(ConfidencePolicy()),
    "contrastive": rule(ContrastivePolicy()),
    "grammar": options(structured_outputs=StructuredOutputs(regex="[a-m ]{3,8}[n-z ]+")),
    "tools": sets(offers_tools=True),
    "stop strings": options(stop=("e", "th")),
    "penalties": options(presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.3),
    "n": several,
    "seed": options(temperature=0.8, seed=5),
    "echo": options(prompt_logprobs=2),
    "stream": way("stream"),
    "failing neighbour": way("failing neighbour"),
    "cancel": way("cancel"),
    "preempt": way("preempt"),
    "save and load": step("save and load"),
    "calibrate": step("calibrate"),
    "servers": step("servers"),
    "serve": step("serve"),
    "eval": step("eval"),
    "resume": step("resume"),
    "lm-eval": step("lm-eval"),
}
RULES = {"threshold", "budget", "joint", "mixture", "confidence", "contrastive"}
ASKING = {"mixture", "confidence", "contrastive"}
ENDS = {"serve", "eval", "lm-eval", "resume"}
"""Ways to use a collaboration. "resume" is an evaluation."""
WITHOUT_MEANING: list[tuple[set[str], set[str]]] = [
    (RULES, RULES),
    (ENDS, ENDS - {"eval"}),
    ({"one assistant"}, {"two assistants"}),
    # An evaluation and the harness make their own requests, and thresholds alone are calibrated.
    ({"eval", "resume", "lm-eval", "calibrate"}, {"tools", "n", "echo", "stream", "cancel"}),
    ({"calibrate"}, RULES - {"threshold"}),
    ({"lm-eval"}, {"seed", "penalties", "grammar"}),
    ({"servers"}, {"preempt"}),  # the caches are theirs
]
PAIRS = [
    (one, other)
    for one, other in combinations(CAPABILITIES, 2)
    if not any((one in a and other in b) or (one in b and other in a) for a, b in WITHOUT_MEANING)
]
REFUSED = {
    *(("two tokenizers", rule) for rule in ASKING),
    ("two tokenizers", "grammar"),
    ("two tokenizers", "echo"),
    ("two tokenizers", "servers"),
    ("tool", "servers"),
    ("quantized base", "servers"),
    *((rule, "servers") for rule in (*ASKING, "joint")),
    *((feature, "servers") for feature in ("grammar", "penalties", "echo")),
    ("echo", "stream"),
    ("servers", "lm-eval"),
}


# Members


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("crossings")


def knows(text: str) -> str | None:
    """What a tool says after a vowel."""
    return " km away" if text[-1:] in "aeiou" else None


@pytest.fixture(scope="module", autouse=True)
def _a_tool() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collm.models.tools.open_tool", lambda spec: BuiltInTool(knows))
        yield


@dataclass
class Members:
    """A collaboration's parts, and the modules that slow loops read."""

    base: Any
    assistants: list[Any]
    head: DeferralHead
    tokenizers: list[Any]
    slow: list[Any]

    def model(self, **more: Any) -> CoLLM:
        template = PromptTemplate(chat=CHAT)
        named = {} if "servers" in more else {"tokenizers": self.tokenizers[1:]}
        return CoLLM(self.base, self.assistants, self.head, self.tokenizers[0], template=template, **named, **more)


class World:
    """Members, made once for all cases that share them, and what slow loops said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._members: dict[Any, Members] = {}
        self._said: dict[Any, Any] = {}

    def saved(self, name: str, tokenizer: Any, seed: int, **changes: Any) -> ModelSpec:
        path = self.folder / name
        if not path.exists():
            writing_model(tokenizer, seed, ends=0.0, **changes).save_pretrained(path)
            tokenizer.save_pretrained(path)
        return ModelSpec(str(path))

    def members(self, case: Case) -> Members:
        if case.members not in self._members:
            self._members[case.members] = self._make(case)
        return self._members[case.members]

    def _make(self, case: Case) -> Members:
        own, other = two_tokenizers()
        spec = self.saved("base", own, 1)
        if case.quantized:
            spec = replace(spec, quantization="nf4", dtype="float32")
        base: Any = load_model(spec)
        if case.adapter:
            torch.manual_seed(0)
            base = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        models = [self.saved("assistant", own, 2, hidden_size=48), self.saved("assistant-2", own, 3)][: case.models]
        tokenizers = [own] * (1 + case.models + case.tools)
        if case.strange:
            models[0], tokenizers[1] = self.saved("stranger", other, 2, hidden_size=48), other
        tools = [ToolSpec("date", eps=0.05)] * case.tools
        slow = [ToolModel(tool, own, name="", vocab_size=len(own)) for tool in tools]
        modules = [base, *map(load_model, models), *slow]
        head = random_head(32, len(models) + len(tools), scale=0.6)
        return Members(base.eval(), [*models, *tools], head, tokenizers, modules)

    def said(self, case: Case, prompt: Prompt, params: SamplingParams, guess: Sequence[int]) -> Any:
        """Tokens and authors, by a slow loop."""
        key = case.members, str(prompt), str(params), case.policy
        if key not in self._said:
            self._said[key] = self._say(case, prompt, params, guess)
        return self._said[key]

    def _say(self, case: Case, prompt: Prompt, params: SamplingParams, guess: Sequence[int]) -> Any:
        members = self.members(case)
        model, slow = members.model(), members.slow
        token_ids = model.template.encode_prompt(model.tokenizer, prompt)
        if model.alignment is None:
            eos, tokenizer = model.tokenizer.eos_token_id, model.tokenizer
            return slow_decode(slow, members.head, token_ids, case.policy, params, eos, tokenizer, guess=guess)
        if case.tools:  # no slow loop has tools and segments
            (alone,) = model.generate([prompt], params, policy=case.policy, max_batch=1)
            return alone.token_ids, alone.authors
        prompts = [token_ids, *model.assistant_prompts(prompt)]
        return SlowSegments(slow, model.alignment, members.head, prompts, case.policy, params).run()[:2]

    def prompt_logprobs(self, case: Case, token_ids: Sequence[int]) -> list[float]:
        """log sum_z P(z) P_z of each token but the first."""
        members = self.members(case)
        readings = [Reading(model, list(token_ids), torch.device("cpu")) for model in members.slow]
        found = []
        for end in range(1, len(token_ids)):
            text = list(token_ids[:end])
            with torch.no_grad():
                by_author = author_logprobs(members.head(readings[0].hidden(text)))[0]
                each = [
                    _gold_logprob(reading, model, token_ids, end)
                    for reading, model in zip(readings, members.slow, strict=True)
                ]
            found.append(float(torch.logsumexp(by_author + torch.tensor(each), 0)))
        return found


def _gold_logprob(reading: Reading, model: Any, token_ids: Sequence[int], end: int) -> float:
    if isinstance(model, ToolModel):
        return float(model.score(token_ids[: end + 1], [place == end for place in range(end + 1)])[0])
    return float(reading.logits(list(token_ids[:end]))[0].log_softmax(-1)[token_ids[end]])


@pytest.fixture(scope="module")
def world(folder: Path) -> World:
    return World(folder)


class Refused(Exception):  # noqa: N818
    """A combination was refused before work began."""


@contextmanager
def before_work() -> Iterator[None]:
    """What is refused here is refused in one sentence."""
    try:
        yield
    except ModelFailure:
        raise
    except CollmError as error:
        raise Refused(str(error)) from error


# Running


def fails_on_poison(model: CoLLM, patch: pytest.MonkeyPatch) -> None:
    """All models in memory raise where they read the poisoned token."""
    for runner, tokenizer in zip(model.runners, model.tokenizers, strict=True):
        if not isinstance(runner, ModelRunner):
            continue
        (poison,) = tokenizer(POISON)["input_ids"]
        plain = runner.model.hidden_states

        def raises(input_ids: torch.Tensor, plain: Any = plain, poison: int = poison, **inputs: Any) -> torch.Tensor:
            if (input_ids == poison).any():
                raise RuntimeError("device-side assert")
            return plain(input_ids, **inputs)

        patch.setattr(runner.model, "hidden_states", raises)


def prepare(model: CoLLM, case: Case, patch: pytest.MonkeyPatch) -> None:
    """What a way of running needs of the models."""
    if model.servers is not None:
        return
    if "failing neighbour" in case.ways:
        fails_on_poison(model, patch)
    if "preempt" in case.ways:
        for runner in model.runners:
            if isinstance(runner, ModelRunner):
                runner.set_capacity(160 if model.alignment is None else 320)


def decode(model: CoLLM, case: Case) -> list[Completion]:
    """The completions of all prompts, n for each, in company of what the ways add."""
    with before_work():
        requests = [model.request(prompt, params, case.policy) for prompt in case.prompts for params in case.params]
        loop = model.engine(max_batch=8, **({} if model.servers else {"lookahead": 4}))
        wanted = {loop.add(request): place for place, request in enumerate(requests)}
    others = {
        name: loop.add(model.request(prompt, case.params[0], case.policy))
        for name, prompt in {"failing neighbour": f"{POISON} it", "cancel": "it is what"}.items()
        if name in case.ways
    }
    came, texts, failed = dict[int, Completion](), dict[int, str](), list[int]()
    for round_ in range(3000):
        if round_ == 2 and "cancel" in others:
            loop.cancel(others["cancel"])
        if not loop.has_work:
            break
        for output in loop.step():
            if output.failure is not None:
                assert isinstance(output.failure, ModelFailure), output.failure
                failed.append(output.number)
            elif output.number in wanted:
                assert output.step is not None
                texts[output.number] = texts.get(output.number, "") + output.step.text
                if output.completion is not None:
                    came[output.number] = output.completion
    assert not loop.has_work
    assert failed == [number for name, number in others.items() if name == "failing neighbour"]
    assert {number: one.text for number, one in came.items()} == texts
    assert came.keys() == wanted.keys()
    for number, one in came.items():
        if (most := requests[wanted[number]].params.prompt_logprobs) is not None:
            one.prompt_logprobs = model.prompt_logprobs(one.prompt_token_ids, most, policy=case.policy)
    assert open_slots(model) == 0
    return [came[number] for number in wanted]


def stream(model: CoLLM, case: Case) -> list[Completion]:
    """The same from `CoLLM.stream`, one at a time, of which another may be left at its second token."""
    found = []
    for prompt in case.prompts:
        for params in case.params:
            with before_work():
                steps = model.stream(prompt, params, policy=case.policy)
            if "cancel" in case.ways:
                next(steps)
                steps.close()
                assert open_slots(model) == 0
                steps = model.stream(prompt, params, policy=case.policy)
            written = list(steps)
            found.append(
                Completion(
                    [one.token_id for one in written],
                    [one.text for one in written],
                    [one.author for one in written],
                    [one.defer_prob for one in written],
                    [one.logprob for one in written],
                    "length",
                    model.template.encode_prompt(model.tokenizer, prompt),
                )
            )
    assert open_slots(model) == 0
    return found


def check(world: World, case: Case, asked: Sequence[Asked], found: Sequence[Completion]) -> None:
    """Completions against the slow loop."""
    for (prompt, params), one in zip(asked, found, strict=True):
        token_ids, authors = world.said(case, prompt, params, one.token_ids)
        text = two_tokenizers()[0].decode(token_ids, skip_special_tokens=True)
        if ends := [text.find(stop) for stop in params.stop if stop in text]:
            text, token_ids, authors = text[: min(ends)], *(each[: len(one.token_ids)] for each in (token_ids, authors))
        assert (one.text, one.token_ids, one.authors) == (text, token_ids, authors)
        if params.prompt_logprobs is not None:
            logprobs = [each.logprob for each in one.prompt_logprobs[1:] if each is not None]
            assert logprobs == pytest.approx(world.prompt_logprobs(case, one.prompt_token_ids), abs=1e-4)


# Workflows


def run(world: World, case: Case, tmp_path: Path, patch: pytest.MonkeyPatch, stack: ExitStack) -> None:
    """Build, prepare, use and check."""
    with before_work():
        model = build(world, case, tmp_path, stack)
    prepare(model, case, patch)
    if "calibrate" in case.steps:
        calibrated(world, model, case, tmp_path / "collaboration")
    ends = case.steps & ENDS
    if "serve" in ends:
        over_http(world, model, case)
    elif ends & {"eval", "resume"}:
        evaluated(world, model, case, tmp_path / "out", patch)
    elif "lm-eval" in ends:
        harnessed(world, model, case)
    else:
        streams = case.ways >= {"stream"} and case.ways <= {"stream", "cancel"}
        found = stream(model, case) if streams else decode(model, case)
        if model.servers is not None and case.params[0].temperature:  # vLLM has other random numbers
            assert [one.token_ids for one in decode(model, case)] == [one.token_ids for one in found]
            return
        check(world, case, [(prompt, params) for prompt in case.prompts for params in case.params], found)


def build(world: World, case: Case, tmp_path: Path, stack: ExitStack) -> CoLLM:
    members = world.members(case)
    path = tmp_path / "collaboration"
    if "save and load" in case.steps:
        members.model().save_pretrained(path)
    if "servers" not in case.steps:
        return CoLLM.from_pretrained(path) if "save and load" in case.steps else members.model()
    exported = world.folder / f"export {case.members}"
    if not exported.exists():
        members.model().export_vllm(exported)
    served = [Served.exported(exported)]
    served += [
        Served(module, tokenizer)
        for module, tokenizer in zip(members.slow[1:], members.tokenizers[1:], strict=True)
        if isinstance(module, PreTrainedModel)
    ]
    fakes = [stack.enter_context(FakeVllm(one, pieces=(1, 3, 2), max_model_len=512)) for one in served]
    if "failing neighbour" in case.ways:
        (poison,) = two_tokenizers()[0](POISON)["input_ids"]
        for fake in fakes:
            fake.always = lambda body: refusal(400, "poison") if poison in body["prompt"] else None
    urls = [fake.url for fake in fakes] + ["http://127.0.0.1:9/v1"] * case.tools
    servers = Servers(urls, timeout_s=20.0)
    if "save and load" in case.steps:
        model = CoLLM.from_pretrained(path, servers=servers)
    else:
        model = members.model(servers=servers)
    stack.callback(lambda: model.backend.fleet.close() if "fleet" in vars(model.backend) else None)
    return model


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
    validation = Validation(rows, "these", "token_f1", case.params[0], rates=(0.5,), refine=0)
    if "failing neighbour" in case.ways:
        with pytest.raises(ModelFailure):
            validation.calibrate(model, quiet=True)
        assert open_slots(model) == 0
        return
    found = validation.calibrate(model, quiet=True)
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
    task = task_named("rows", metric="token_f1", max_new_tokens=12, stop=case.options.get("stop", ()))

    def ask() -> None:
        try:
            systems = systems_named(model, ["base", name], ThresholdPolicy(threshold))
            seed = case.options.get("seed", 0)
            compare(systems, task, items, out, threshold=threshold, params=params, max_batch=2, seed=seed)
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


def body_of(case: Case, prompt: Prompt) -> tuple[str, dict[str, Any]]:
    """The path and the body of a request."""
    given = dict(case.options)
    body: dict[str, Any] = {"model": "m", "max_tokens": 12, "n": case.n, "temperature": 0.0}
    threshold = isinstance(case.policy, ThresholdPolicy)
    body["collm"] = {"threshold": case.policy.threshold} if threshold else {"policy": name_of(case.policy)}  # type: ignore[attr-defined]
    if structured := given.pop("structured_outputs", None):
        body["structured_outputs"] = {"regex": structured.regex}
    if (most := given.pop("prompt_logprobs", None)) is not None:
        body |= {"echo": True, "logprobs": most}
    body |= {**given, **({"stop": list(given["stop"])} if "stop" in given else {})}
    if case.offers_tools:
        return "/v1/chat/completions", {**body, "messages": list(prompt), "tools": TOOLS}
    return "/v1/completions", {**body, "prompt": prompt}


def ask_http(running: Running, case: Case, prompt: Prompt) -> list[Completion]:
    path, body = body_of(case, prompt)
    choices = dict[int, list[Any]]()
    if "stream" in case.ways:
        with running.client.stream("POST", path, json={**body, "stream": True}) as reply:
            lines = list(reply.iter_lines())
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")] if reply.is_success else []
            refused = "".join(lines)
    else:
        reply = running.client.post(path, json=body)
        events, refused = [reply.json()] if reply.is_success else [], reply.text
    if 400 <= reply.status_code < 500:
        with before_work():
            raise CollmError(json.loads(refused)["error"]["message"])
    assert reply.is_success, f"{reply.status_code}: {refused}"
    for event in events:
        for choice in event["choices"]:
            one = choices.setdefault(choice["index"], ["", [], [], []])
            message = choice.get("message") or choice.get("delta") or choice
            one[0] += message.get("content") or message.get("text") or ""
            one[1] += choice["collm"]["token_ids"]
            one[2] += choice["collm"]["authors"]
            if choice.get("logprobs"):
                one[3] += choice["logprobs"]["token_logprobs"]
    prompt_ids = running.models["m"].template.encode_prompt(running.models["m"].tokenizer, prompt)
    found = []
    for _, (text, token_ids, authors, logprobs) in sorted(choices.items()):
        if "prompt_logprobs" in case.options:
            assert text.startswith(str(prompt))
            text = text.removeprefix(str(prompt))
        one = Completion(token_ids, [text], authors, [], [], "length", prompt_ids)
        if logprobs:
            of_prompt = zip(prompt_ids, logprobs, strict=False)
            one.prompt_logprobs = [PromptLogprob(token_id, logprob, 1, ()) for token_id, logprob in of_prompt]
        found.append(one)
    return found


def leave_http(running: Running, case: Case) -> None:
    """Ask for a stream and leave after its first bytes."""
    path, body = body_of(case, case.prompts[0])
    with running.client.stream("POST", path, json={**body, "stream": True}) as reply:
        next(reply.iter_raw())


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_pair(one: str, other: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    for name in (one, other):
        CAPABILITIES[name](case)
    with ExitStack() as stack:
        try:
            run(world, case, tmp_path, monkeypatch, stack)
            refused = ""
        except Refused as refusal:
            refused = str(refusal)
            assert "\n" not in refused
            assert 10 < len(refused) < 400
    assert bool(refused) == ((one, other) in REFUSED), refused
