"""A collaboration as a model of lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import formatannotation
from itertools import count
from typing import TYPE_CHECKING, Any, cast, get_type_hints

import torch

from collm.artefact import library_versions
from collm.collaboration import CoLLM
from collm.core.named import policy_named
from collm.core.objective import marginal_logprobs
from collm.core.params import SamplingParams
from collm.core.policies import ThresholdPolicy
from collm.core.types import Completion
from collm.errors import ConfigError, MissingExtra, RequestError
from collm.evaluation.gold import gold_views, greedy_writes
from collm.text.alignment import Alignment
from collm.text.template import tokenize
from collm.training.examples import Example, Examples, aligned_example, joined, windows
from collm.training.inspection import TokenViews
from collm.training.scoring import progress_bar
from collm.untrusted import fits

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import DEFAULT_MAX_LENGTH, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ImportError as error:
    raise MissingExtra("lm-eval", "eval") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)

AUTO_GROUP = 256  # texts scored together with batch size "auto"; they are divided into batches by their tokens
UNCHOSEN_DEVICE = "cuda:0"  # the default of the harness's command line, for which the artefact's device is taken
MAX_GEN_TOKS = 256  # the default of the harness's own models

_LOADING: dict[str, Any] = {"pretrained": str | int, "device": str, "dtype": str, "trust_code": bool}

Pair = tuple[Any, list[int], list[int]]
"""A request's texts, its context tokens, and its continuation tokens."""


class HarnessLM(TemplateLM):  # type: ignore[misc]
    """A collaboration as a model of lm-evaluation-harness.

    Likelihoods are those of the joint model, log sum_z P(z | x_<t) P_z(x_t | x_<t) per token in fp32, whatever the
    threshold, budget or policy: there is one likelihood for all of them, so it cannot compare them. A continuation is
    greedy if greedy decoding at the operating threshold writes it (`gold.greedy_writes`).
    The artefact's prompt template is not used, its chat template with `--apply_chat_template`.

    Args:
        threshold, budget: as for `CoLLM.generate`. By default the calibrated threshold.
        policy: name of another policy, for generation only.
        batch_size: maximum number of texts read or decoded at once. "auto" divides texts to score by their tokens, and
            decodes 16 prompts at once.
        max_length: maximum number of tokens of a sequence, by default the shortest context of all models. Longer texts
            are truncated on the left.
        add_bos_token: whether the tokenizer adds special tokens. By default if the text does not begin with BOS.
    """

    def __init__(
        self,
        model: CoLLM,
        *,
        threshold: float | None = None,
        budget: float | None = None,
        policy: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__()
        if policy is not None and (threshold is not None or budget is not None):
            raise ConfigError("threshold and budget have no effect with another policy; leave them out")
        self.model, self.tokenizer, self.add_bos_token = model, model.tokenizer, add_bos_token
        if batch_size != "auto" and (not str(batch_size).isdecimal() or int(batch_size) < 1):
            raise ConfigError(f"batch size is {batch_size!r}, expected a positive number of texts, or auto")
        self.batch_size = None if batch_size == "auto" else int(batch_size)
        self.max_length = _max_length(model, max_length)
        self.policy = policy_named(policy) if policy else ThresholdPolicy(model.threshold(threshold, budget))

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> HarnessLM:
        """Create the model from `--model_args` and the options batch_size, max_batch_size and device."""
        loading, options = model_arguments(arg_dict, additional_config or {})
        return cls(CoLLM.from_pretrained(**loading), **options)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> HarnessLM:
        """Create the model from "name=value,name=value" and options."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness stores with its results."""
        return {"policy": str(self.policy), "versions": library_versions()}

    @property
    def eot_token_id(self) -> int:
        return cast(int, self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or EOS if there is no BOS."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise ConfigError("the tokenizer has neither BOS nor EOS to put before a text; set one")
        return cast(int, eos if bos is None else bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        special = self.add_bos_token is not False if add_special_tokens is None else add_special_tokens
        bos = self.tokenizer.bos_token
        begun = add_special_tokens is None and bos is not None and string.startswith(str(bos))
        return tokenize(self.tokenizer, string, special=special and not begun)

    @property
    def tokenizer_name(self) -> str:
        """A name for tokenizer and chat template, for the harness's request cache."""
        name = str(self.tokenizer.name_or_path).replace("/", "__")
        return f"{name}-{hashlib.sha256(str(self.model.template.chat).encode()).hexdigest()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The collaboration's chat template, for the harness's results; None if chats are not rendered."""
        if isinstance(chat_template, str):
            raise ConfigError(f"chat template {chat_template!r} does not exist; a collaboration has one without a name")
        return self.model.template.chat if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat up to the assistant's turn, or including the last message as the beginning of that turn."""
        before = chat_history if add_generation_prompt else chat_history[:-1]
        text = self.model.template.render_chat(self.tokenizer, before, open_turn=True)
        if self.tok_encode(text) != tokenize(self.tokenizer, text, special=False):
            raise ConfigError(
                "the tokenizer adds special tokens before rendered chats, which training did not; "
                "add add_bos_token=false to --model_args"
            )
        return text if add_generation_prompt else text + chat_history[-1]["content"]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        threshold = self.policy.threshold if isinstance(self.policy, ThresholdPolicy) else self.model.threshold()
        answers: dict[int, tuple[float, bool]] = {}
        parts = [self._example(context, continuation) for _, context, continuation in requests]
        for index, views in self._views(parts, show=not disable_tqdm):
            greedy = bool(greedy_writes(views, threshold).all())
            answers[index] = (_log_likelihood(views), greedy)
            self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, in the harness's windows of `max_length` tokens.

        If tokenizers differ, windows consist of whole segments.
        """
        found = [(n, window) for n, request in enumerate(requests) for window in _windows(self, *request.args)]
        totals = [0.0] * len(requests)
        for index, views in self._views([window for _, window in found], show=not disable_tqdm):
            totals[found[index][0]] += _log_likelihood(views)
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _views(self, parts: Sequence[Examples], *, show: bool) -> Iterator[tuple[int, TokenViews]]:
        """The index of each part, of one example, and the authors' predictions for its targets, the longest first."""
        examples = joined(parts)
        order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].token_ids), index))
        size = self.batch_size or AUTO_GROUP
        with progress_bar("scoring", "texts", enabled=show) as report:
            for start in range(0, len(order), size):
                group = order[start : start + size]
                read = gold_views(self.model, examples.part(group))
                yield from zip(group, read.split([examples[index].num_targets for index in group]), strict=True)
                report(start + len(group), len(order))

    def _example(self, context: list[int], continuation: list[int]) -> Examples:
        """The context, without what does not fit on its left, and the continuation as targets."""
        if not 1 <= len(continuation) <= self.max_length:
            raise RequestError(
                f"a continuation has {len(continuation)} tokens, expected 1 to {self.max_length}, which the models read"
            )
        kept = _last([*(context or [self.prefix_token_id]), *continuation], self.max_length + 1, "context")
        begin = len(kept) - len(continuation)
        alignment = self.model.alignment
        if alignment is None:
            return Examples([Example(kept, [place >= begin for place in range(len(kept))])])
        text = str(self.tokenizer.decode(continuation, clean_up_tokenization_spaces=False))
        return _aligned_text(alignment, kept[:begin], text)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each prompt. With sampling, request i has the harness's torch seed + i."""
        prompts, params, seed = [], [], torch.initial_seed()
        for number, (context, options) in enumerate(request.args for request in requests):
            wanted = sampling_params(options)
            room = self.max_length - wanted.max_tokens
            if room < 1:
                raise ConfigError(
                    f"max_gen_toks is {wanted.max_tokens}, which leaves no room for a prompt in the models' "
                    f"context of {self.max_length} tokens; lower it with --gen_kwargs max_gen_toks=.."
                )
            prompts.append(_last(self.tok_encode(context) or [self.prefix_token_id], room, "prompt"))
            draws = self.policy.draws or wanted.temperature > 0
            params.append(replace(wanted, seed=seed + number) if draws else wanted)
        done = count(1)
        with progress_bar("generating", "texts", enabled=not disable_tqdm) as report:

            def keep(index: int, completion: Completion) -> None:
                self.cache_hook.add_partial("generate_until", requests[index].args, completion.text)
                report(next(done), len(requests))

            sizes: dict[str, Any] = {} if self.batch_size is None else {"max_batch": self.batch_size}
            found = self.model.generate(prompts, params, policy=self.policy, on_completion=keep, **sizes)
        return [completion.text for completion in found]


def _aligned_text(alignment: Alignment, context: list[int], text: str) -> Examples:
    """A text after a context. An assistant without a token for the context reads its EOS there."""
    of_assistants = zip(alignment.tokenizers[1:], alignment.assistant_prompts(context), strict=True)
    prompts = [context, *(prompt or [min(tokenizer.eos_ids)] for tokenizer, prompt in of_assistants)]
    return aligned_example(alignment, prompts, text, end=False)


def _last(token_ids: list[int], room: int, what: str) -> list[int]:
    """The tokens without those on the left that do not fit."""
    if len(token_ids) > room:
        logger.warning("a %s is too long; its first %d tokens were removed", what, len(token_ids) - room)
    return token_ids[-room:]


def _log_likelihood(views: TokenViews) -> float:
    """The log-likelihood of all tokens together, nats."""
    logprobs = marginal_logprobs(views.base_logprob, views.assistant_logprobs, views.defer_logits)
    return float(logprobs.double().sum())


def model_arguments(given: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `CoLLM.from_pretrained` and of `HarnessLM`, from `--model_args` and options of the harness."""
    chosen = {name: value for name, value in options.items() if value not in (None, UNCHOSEN_DEVICE)}
    if twice := sorted(given.keys() & chosen.keys()):
        raise ConfigError(f"{', '.join(twice)} is given in --model_args and as --{twice[0]}; give the option only")
    merged, hints = {**given, **chosen}, get_type_hints(HarnessLM.__init__)
    kinds = _LOADING | {name: kind for name, kind in hints.items() if name not in ("model", "return")}
    if unknown := sorted(merged.keys() - kinds.keys()):
        raise ConfigError(f"unknown model argument {', '.join(unknown)}; expected {', '.join(kinds)}")
    for name, value in merged.items():
        if not fits(value, kinds[name]):
            raise ConfigError(f"model argument {name} is {value!r}, expected {formatannotation(kinds[name])}")
    if "pretrained" not in merged:
        raise ConfigError("there is no collaboration; add pretrained=DIR to --model_args")
    path = str(merged.pop("pretrained"))
    loading = {name: merged.pop(name) for name in _LOADING if name in merged}
    return {"path": path, **loading}, merged


def _max_length(model: CoLLM, wanted: int | None) -> int:
    """Maximum number of tokens of a sequence, by default the shortest context of all models."""
    limit = min((one.max_length for one in model.members if one.max_length is not None), default=None)
    if wanted is not None and not 1 <= wanted <= (limit or wanted):
        raise ConfigError(f"max_length is {wanted}, expected from 1 to {limit or 'any'}, the models' context")
    return wanted or limit or int(DEFAULT_MAX_LENGTH)


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from generation options of the harness.

    `do_sample=False` means temperature 0, and empty texts of `until` end nothing, as for the harness's own models.
    """
    given: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), MAX_GEN_TOKS))
    stop, max_tokens = filter(None, given.pop("until")), given.pop("max_gen_toks")
    sampled, temperature = given.pop("do_sample"), float(given.pop("temperature", 0.0))
    truncation = {name: given.pop(name) for name in ("top_p", "top_k") if name in given}
    if given.pop("num_beams", 1) != 1 or given:
        refused = ", ".join(f"{name}={options[name]!r}" for name in options if name in {*given, "num_beams"})
        raise ConfigError(
            f"generation option {refused} has no effect here; expected until, max_gen_toks, do_sample, temperature, "
            "top_p and top_k"
        )
    if sampled and temperature == 0:
        raise ConfigError("do_sample=True has no effect at temperature 0; give a temperature above 0")
    return SamplingParams(max_tokens, temperature, stop=tuple(stop), **truncation)


def _windows(harness: HarnessLM, text: str) -> list[Examples]:
    """The windows of a text. Each token is a target of one."""
    alignment, prefix = harness.model.alignment, harness.prefix_token_id
    if alignment is None:
        cut = get_rolling_token_windows(harness.tok_encode(text), prefix, harness.max_length, 1)
        return [harness._example(*make_disjoint_window(window)) for window in cut]
    return windows(_aligned_text(alignment, [prefix], text), harness.max_length) if text else []
