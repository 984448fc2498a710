"""What a collaboration is made of, what is asked of it, and how: a combination of capabilities."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from collm import SamplingParams
from collm.core.policies import Policy, ThresholdPolicy
from collm.text.chats import Chat
from collm.text.template import Prompt

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
        params = SamplingParams(**{"max_tokens": 12, **self.options})
        return [params if params.seed is None else replace(params, seed=params.seed + i) for i in range(self.n)]

    @property
    def prompts(self) -> list[Prompt]:
        if not self.offers_tools:
            return list(PROMPTS)
        return [Chat([{"role": "user", "content": prompt}], TOOLS) for prompt in PROMPTS]
