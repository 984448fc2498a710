"""The models that requests can name, and the start and end of their workers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from collm.collaboration import CoLLM
from collm.core.params import SamplingParams
from collm.core.policies import Policy, SingleAuthorPolicy
from collm.engine.request import PromptIds, check_prompt
from collm.errors import CollmError, ConfigError, MissingExtra, RequestError
from collm.serving.errors import APIError, invalid, not_now, refused
from collm.serving.schemas import CollmOptions
from collm.serving.settings import Settings
from collm.serving.worker import Worker, without_panic
from collm.text.chats import Chat
from collm.text.template import Prompt, tokenize

T = TypeVar("T")

TOO_LONG = "context_length_exceeded"
"""OpenAI's code, at which clients shorten a conversation."""
MAX_TOKEN_CHARACTERS = 128
"""A prompt with more characters than that for each token that fits is refused before it is tokenized."""
MAX_THREADS = 8
"""Largest number of threads that encode prompts and compile grammars."""
STOP_S = 5.0
"""Time for the current step of a worker when the server stops."""


@dataclass(frozen=True)
class Target:
    """A collaboration, or one author of it. Methods raise an APIError for what the client can correct."""

    name: str
    worker: Worker
    settings: Settings
    author: int | None = None

    @property
    def model(self) -> CoLLM:
        return self.worker.model

    @property
    def default_threshold(self) -> float | None:
        """The threshold of requests that have none; None if there is no default."""
        if self.settings.threshold is not None:
            return self.settings.threshold
        if self.settings.price is not None and len(self.settings.price) == 1:
            return self.model.threshold(price=self.settings.price)
        return self.model.calibration.best().threshold if self.model.calibration else None

    @property
    def max_model_len(self) -> int | None:
        """Longest prompt with its answer, in tokens; None if there is no limit or the models are being loaded."""
        runners = self.model.runners if self.worker.ready else ()
        return min((one.max_length for one in runners if one.max_length is not None), default=None)

    def info(self) -> dict[str, Any]:
        """Public information about the collaboration."""
        calibration = self.model.calibration and self.model.calibration.to_dict()
        shown = ("metric_name", "num_prompts", "points", "budgets")
        return {
            "id": self.name,
            "author_names": self.model.author_names,
            "alone": [f"{self.name}/{author}" for author in self.model.author_names],
            "default_threshold": self.default_threshold,
            "calibration": calibration and {key: calibration[key] for key in shown},
            "chat": self.model.template.chat is not None,
        }

    def policy(self, options: CollmOptions | None) -> Policy:
        options = options or CollmOptions.model_validate({})
        if self.author is not None:
            if options.model_fields_set:
                whole = self.worker.name
                message = f"{self.name} is one author alone, so collm has no effect; leave it out or ask {whole}"
                raise invalid(message, "collm")
            return SingleAuthorPolicy(self.author)
        threshold, price = options.threshold, options.price
        given = [name for name in ("policy", "budget", "price", "threshold") if getattr(options, name) is not None]
        blamed = "judge" if options.judge is not None else (given or ["threshold"])[0]
        if not given or (given == ["policy"] and options.policy == "threshold"):
            threshold, price = self.default_threshold, None
            if self.settings.price is not None:
                threshold, price = None, list(self.settings.price)
            elif threshold is None:
                message = f"there is no default threshold: {self.name} is not calibrated; send collm.threshold, start"
                message += " the server with --threshold, or run 'collm calibrate' first"
                raise invalid(message, "collm.threshold")
        with refused(f"collm.{blamed}"):
            return self.model.policy(options.policy, threshold, options.budget, price, options.judge)

    def encode(self, prompt: Prompt, param: str, keep_last: int | None = None) -> PromptIds:
        """Encode the prompt of a parameter. `keep_last` tokens remain: -1 for as many as fit, None for all."""
        model, longest = self.model, self.settings.max_prompt_tokens
        fitting = [one.max_length - 1 for one in model.runners if one.max_length is not None]
        fitting += [] if longest is None else [longest]
        if keep_last is None and fitting and _characters(prompt) > min(fitting) * MAX_TOKEN_CHARACTERS:
            message = f"the prompt has {_characters(prompt)} characters, this server takes {min(fitting)} tokens"
            raise invalid(f"{message}; shorten it", param, TOO_LONG)
        with refused(param):
            token_ids = model.template.encode_prompt(model.tokenizer, prompt)
            assistants = model.assistant_prompts(prompt)
            if keep_last is not None:
                kept = min([*fitting, len(token_ids)]) if keep_last < 0 else min(keep_last, len(token_ids))
                token_ids = token_ids[len(token_ids) - kept :]
                assistants = model.assistant_prompts(token_ids)
        self.check_prompt(token_ids, param)
        if longest is not None and len(token_ids) > longest:
            message = f"the prompt has {len(token_ids)} tokens, this server takes {longest}; shorten it"
            raise invalid(message, param, TOO_LONG)
        return PromptIds(token_ids, assistants)

    def check_prompt(self, token_ids: list[int], param: str) -> None:
        """Check that token ids are known and fit the context."""
        model = self.model
        authors = model.runners if model.alignment is None else model.runners[:1]
        try:
            check_prompt(authors, model.identity.vocab_size, token_ids)
        except RequestError as error:
            limits = [one.max_length for one in authors if one.max_length is not None]
            too_long = len(token_ids) >= min(limits, default=len(token_ids) + 1)
            raise invalid(str(error), param, TOO_LONG if too_long else None) from error

    def check_params(self, params: SamplingParams, form: str) -> None:
        """Check that this model supports parameters. Grammars are compiled; `form` is the parameter that has one."""
        try:
            self.model.check_params(params)
        except MissingExtra as error:
            raise APIError(501, str(error), param=form, code="not_installed") from error
        except CollmError as error:
            param, _, rest = str(error).partition(" ")
            param = form if param.startswith("structured_outputs") else param
            raise invalid(f"{param} {rest}", param) from error

    def tokenize(self, prompt: str | Chat, *, special: bool) -> list[int]:
        """The token ids of a text without a template, or of a chat."""
        template, tokenizer = self.model.template, self.model.tokenizer
        with refused("prompt" if isinstance(prompt, str) else "messages"):
            if not isinstance(prompt, str):
                prompt = template.render_chat(tokenizer, prompt, open_turn=prompt.add_generation_prompt)
            return tokenize(tokenizer, prompt, special=special)

    def detokenize(self, token_ids: list[int], *, special: bool = True) -> str:
        """The text of token ids, with or without special tokens."""
        vocab_size = self.model.identity.vocab_size
        if outside := [token for token in token_ids if token >= vocab_size]:
            raise invalid(f"token id {outside[0]} is outside the vocabulary of {vocab_size} tokens", "tokens")
        options = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
        return str(self.model.tokenizer.decode(token_ids, **options))


def _characters(prompt: Prompt) -> int:
    """Number of characters of a text, or about that of a chat; 0 for token ids."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(str(one.get("content") or "")) for one in prompt if isinstance(one, Mapping))


class Service:
    """All collaborations with their workers. Methods must be called in the event loop's thread.

    Attributes:
        targets: the collaborations and each of their authors, by model name.
        started: start time, seconds since 1970.
        requests: one future for each running HTTP request. The request ends with the error that is set.
        failure: the exception of a failed worker. `on_failure` is called then.
    """

    def __init__(self, models: Mapping[str, CoLLM], settings: Settings) -> None:
        if not models:
            raise ConfigError("there is no collaboration to serve; give at least one")
        if wrong := [name for name in models if not name or "/" in name]:
            raise ConfigError(f"a collaboration is named {wrong[0]!r}; expected a name without '/'")
        self.settings = settings
        self.collaborations = [Target(name, Worker(name, model, settings), settings) for name, model in models.items()]
        self.targets = {one.name: one for one in self.collaborations}
        for one in self.collaborations:
            for author, name in enumerate(one.info()["alone"]):
                self.targets[name] = replace(one, name=name, author=author)
        self.started = int(time.time())
        self.requests: set[asyncio.Future[APIError]] = set()
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._free_threads = asyncio.Semaphore(MAX_THREADS)

    def target(self, name: str | None) -> Target:
        """The model with this name. Without a name, the first collaboration if all have the same tokenizer."""
        names = ", ".join(self.targets)
        if name is None:
            if len({one.model.identity.hash for one in self.collaborations}) > 1:
                raise invalid(f"model is missing; this server has {names}", "model", "missing_parameter")
            return self.collaborations[0]
        if name not in self.targets:
            message = f"there is no model {name[:80]!r}; this server has {names}"
            raise APIError(404, message, param="model", code="model_not_found")
        return self.targets[name]

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run a function in a thread, which does not keep the process alive. Its exception is raised."""
        await self._free_threads.acquire()
        loop = asyncio.get_running_loop()
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(without_panic(error))
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._free_threads.release)

        threading.Thread(target=run, name="collm request", daemon=True).start()
        return await asyncio.wrap_future(future)

    def start(self) -> None:
        """Load the models of each collaboration in its worker's thread."""
        for one in self.collaborations:
            one.worker.start(self._failed)

    async def drain(self) -> None:
        """Reject new requests, and wait until running requests finish or the drain time is over."""
        for one in self.collaborations:
            one.worker.accepting = False
        end = time.monotonic() + self.settings.drain_s
        while time.monotonic() < end and self.requests:
            await asyncio.sleep(0.05)
        self._end_all()

    async def stop(self) -> None:
        await self.drain()
        for one in self.collaborations:
            await asyncio.to_thread(one.worker.stop, STOP_S)  # requests may hold all threads of `in_thread`

    def _failed(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._end_all()
        self.on_failure()

    def _end_all(self) -> None:
        for request in self.requests:
            if not request.done():
                request.set_result(not_now(503, "the server stopped before the request was finished", "stopping"))
