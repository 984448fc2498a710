"""A base and assistants in memory, and the same behind fake servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead
from collm.vllm.export import export_base
from collm.vllm.servers import Servers
from tests.engine.test_engine import random_head
from tests.tiny_models import make_model, tiny_config
from tests.vllm.fake import FakeVllm, Served


@dataclasses.dataclass
class Members:
    """K + 1 models, and how they are served."""

    models: list[PreTrainedModel]
    head: DeferralHead
    tokenizer: PreTrainedTokenizerFast
    served: list[Served]
    exported: Path

    @property
    def local(self) -> CoLLM:
        return CoLLM(self.models[0], self.models[1:], self.head, self.tokenizer)


def make_members(tokenizer: PreTrainedTokenizerFast, directory: Path, k: int, **of_base: Any) -> Members:
    head = random_head(32, k, scale=1.0)
    head.bias.data += 0.25
    models = [make_model(tiny_config(**of_base), 0)]
    models += [make_model(tiny_config(hidden_size=48), seed) for seed in range(1, k + 1)]
    export_base(models[0], head, tokenizer, directory)
    served = [Served.exported(directory), *(Served(model, tokenizer) for model in models[1:])]
    return Members(models, head, tokenizer, served, directory)


@pytest.fixture(scope="session")
def members(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Members]:
    """members(K); they stay as they are."""
    made: dict[int, Members] = {}

    def of(k: int) -> Members:
        if k not in made:
            made[k] = make_members(tokenizer, tmp_path_factory.mktemp("exported") / "base", k)
        return made[k]

    return of


class Cluster:
    """Members behind fake servers, and a collaboration across them, whose endpoints note their pauses (seconds)."""

    def __init__(self, members: Members, stack: ExitStack) -> None:
        self.members = members
        self._stack = stack
        self.fakes: list[FakeVllm] = []
        self.pauses: list[float] = []

    def serve(self, *, pieces: tuple[int, ...] = (1, 3, 2), of_base: Any = None, **options: Any) -> Cluster:
        for author, served in enumerate(self.members.served):
            more = {**options, **(of_base or {})} if author == 0 else options
            self.fakes.append(self._stack.enter_context(FakeVllm(served, pieces=pieces, **more)))
        return self

    def servers(self, **options: Any) -> Servers:
        return Servers([fake.url for fake in self.fakes], **{"timeout_s": 20.0, **options})

    def connect(self, **options: Any) -> CoLLM:
        """The collaboration, checked; what was counted at the start is forgotten."""
        m = self.members
        model = CoLLM(m.models[0], m.models[1:], m.head, m.tokenizer, servers=self.servers(**options))
        self._stack.callback(model.backend.connections.close)
        for endpoint in model.backend.connections.authors:
            endpoint.http.sleep = self._pause
        for fake in self.fakes:
            fake.bodies.clear()
        return model

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)


@pytest.fixture
def cluster(members: Callable[[int], Members]) -> Iterator[Callable[..., Cluster]]:
    """cluster(K) starts the servers."""
    with ExitStack() as stack:
        yield lambda k=1, **options: Cluster(members(k), stack).serve(**options)
