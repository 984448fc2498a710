"""The collaborations that a server has, by the names that clients call them and their authors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from collm.collaboration import CoLLM
from collm.core.calibration import Calibration
from collm.core.policies import Policy, SingleAuthorPolicy
from collm.core.types import BASE
from collm.decoding.request import check_prompt
from collm.errors import ConfigError, RequestError
from collm.models.template import Prompt
from collm.serving.refusals import Refusal, invalid
from collm.serving.schemas import CollmOptions
from collm.serving.settings import Settings
from collm.serving.worker import Worker


@dataclass(frozen=True)
class Served:
    """A collaboration with its worker."""

    name: str
    model: CoLLM
    worker: Worker

    @property
    def author_names(self) -> list[str]:
        """base, assistant, assistant-2, .."""
        return ["base", "assistant", *(f"assistant-{k}" for k in range(2, len(self.model.assistants) + 1))]

    @property
    def alone(self) -> list[str]:
        """Model names of its authors alone."""
        return [f"{self.name}/{author}" for author in self.author_names]

    def info(self) -> dict[str, Any]:
        """What clients may know of it."""
        calibration = self.model.calibration
        return {
            "id": self.name,
            "author_names": self.author_names,
            "alone": self.alone,
            "default_threshold": calibration.best().threshold if calibration else None,
            "calibration": calibration and _measured(calibration),
            "chat": self.model.template.chat is not None,
        }


def _measured(calibration: Calibration) -> dict[str, Any]:
    found = calibration.to_dict()
    return {key: found[key] for key in ("metric_name", "num_prompts", "points", "budgets")}


@dataclass(frozen=True)
class Target:
    """What a client asks: a collaboration, or one author of it."""

    name: str
    served: Served
    author: int | None = None

    def policy(self, options: CollmOptions | None) -> Policy:
        """Who writes.

        Raises:
            Refusal: options that contradict each other, or no threshold to be had.
        """
        options = options or CollmOptions.model_validate({})
        if self.author is not None:
            if options.model_fields_set:
                raise invalid(
                    f"{self.name} is one author alone, so collm has no effect; leave it out or ask {self.served.name}",
                    param="collm",
                )
            return SingleAuthorPolicy(self.author)
        try:
            return self.served.model.policy(options.policy, options.threshold, options.budget)
        except ConfigError as error:
            raise invalid(str(error), param=_at_fault(options)) from error

    def encode(self, prompt: Prompt, param: str, longest: int | None) -> list[int]:
        """Token ids of a prompt that the models can read.

        Raises:
            Refusal: it is empty, too long, or holds what is no token.
        """
        model = self.served.model
        try:
            token_ids = model.template.encode_prompt(model.tokenizer, prompt)
            self.check(token_ids)
        except RequestError as error:
            raise invalid(str(error), param=param) from error
        if longest is not None and len(token_ids) > longest:
            raise invalid(
                f"the prompt has {len(token_ids)} tokens, this server takes {longest}; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        return token_ids

    def check(self, token_ids: list[int]) -> None:
        """Raise a RequestError for what is no token of the model, or does not fit its context."""
        check_prompt(self.served.model.runners, self.served.model.identity.vocab_size, token_ids)


def _at_fault(options: CollmOptions) -> str:
    """The option that an error is about: the only one that came, or the policy, or the threshold that did not come."""
    given = [name for name in ("policy", "budget", "threshold") if getattr(options, name) is not None]
    return f"collm.{(given or ['threshold'])[0]}"


class Collaborations:
    """All that a server has.

    Raises:
        ConfigError: no collaboration, or a name that would not stand in a request.
    """

    def __init__(self, models: Mapping[str, CoLLM], settings: Settings) -> None:
        if not models:
            raise ConfigError("no collaboration came; give at least one to serve")
        wrong = [name for name in models if not name or "/" in name]
        if wrong:
            raise ConfigError(f"a collaboration is named {wrong[0]!r}; expected a name without '/'")
        self.served = [
            Served(name, model, Worker(name, model, max_batch=settings.max_batch, max_waiting=settings.max_waiting))
            for name, model in models.items()
        ]
        self.targets = {one.name: Target(one.name, one) for one in self.served}
        for one in self.served:
            self.targets |= {name: Target(name, one, author) for author, name in enumerate(one.alone, start=BASE)}

    def target(self, name: str) -> Target:
        """What a client means by a model's name.

        Raises:
            Refusal: nothing is called so.
        """
        if name not in self.targets:
            raise Refusal(
                404,
                f"there is no model {name[:80]!r}; this server has {', '.join(self.targets)}",
                param="model",
                code="model_not_found",
            )
        return self.targets[name]
