"""A collaboration as a model of lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from collm.artefact import library_versions
from collm.collaboration import CoLLM
from collm.core.named import policy_named
from collm.core.objective import marginal_logprobs
from collm.core.policies import ThresholdPolicy
from collm.core.types import Completion
from collm.errors import ConfigError, MissingExtra, RequestError
from collm.evaluation.gold import gold_views, greedy_writes
from collm.evaluation.harness_options import batch_size_of, max_length_of, model_arguments, sampling_params
from collm.text.template import tokenize
from collm.training.examples import Example, Examples, aligned_example, joined
from collm.training.measures import TokenViews
from collm.training.scoring import progress_bar

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ImportError as error:
    raise MissingExtra("lm-eval", "eval") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)

AUTO_GROUP = 256
"""Number of texts scored together with batch size "auto". They are divided into batches by their tokens."""

Pair = tuple[Any, list[int], list[int]]
"""A request's texts (None for a window of a longer text), its context tokens, and its continuation tokens."""


class HarnessLM(TemplateLM):  # type: ignore[misc]
    """A collaboration as a model of lm-evaluation-harness.

    Likelihoods are those of the joint model, log sum_z P(z | x_<t) P_z(x_t | x_<t) per token in fp32. They do not
    depend on the threshold. A continuation is greedy if greedy decoding at the operating threshold writes it
    (`gold.greedy_writes`). The artefact's prompt template is not used. With `--apply_chat_template`, its chat template
    is used.

    Args:
        model: the collaboration.
        threshold, budget: as for `CoLLM.generate`. By default the calibrated threshold.
        policy: name of another policy for generation. Likelihoods are the same.
        batch_size: maximum number of texts read or decoded at once. "auto" divides texts to score by their tokens, and
            decodes 16 prompts at once.
        max_length: maximum number of tokens of a sequence, by default the shortest context of all models. Longer texts
            are truncated on the left.
        add_bos_token: whether the tokenizer adds special tokens. By default if the text does not begin with BOS.

    Raises:
        ConfigError: options that contradict each other or have no effect, or no threshold and no calibration.
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
        self.model = model
        self.tokenizer = model.tokenizer
        self.batch_size = batch_size_of(batch_size)
        self.max_length = max_length_of(model, max_length)
        self.add_bos_token = add_bos_token
        self.policy = policy_named(policy) if policy else ThresholdPolicy(model.threshold(threshold, budget))

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> HarnessLM:
        """Create the model from `--model_args` and the options batch_size, max_batch_size and device.

        Raises:
            ConfigError: an unknown or duplicate argument, or a value of the wrong type.
            ArtefactError, LoadError, MismatchError: as for `CoLLM.from_pretrained`.
        """
        loading, options = model_arguments(arg_dict, additional_config or {})
        return cls(CoLLM.from_pretrained(**loading), **options)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> HarnessLM:
        """Create the model from "name=value,name=value", as `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict[str, Any]:
        """Information that the harness stores with its results."""
        return {"policy": str(self.policy), "versions": library_versions()}

    # Tokens

    @property
    def eot_token_id(self) -> int:
        return cast(int, self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or EOS if there is no BOS."""
        prefix = self.tokenizer.bos_token_id
        if prefix is None:
            prefix = self.tokenizer.eos_token_id
        if prefix is None:
            raise ConfigError("the tokenizer has neither BOS nor EOS to put before a text; set one")
        return cast(int, prefix)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        special = self.add_bos_token is not False if add_special_tokens is None else add_special_tokens
        bos = self.tokenizer.bos_token
        begun = add_special_tokens is None and bos is not None and string.startswith(str(bos))
        return tokenize(self.tokenizer, string, special=special and not begun)

    # Chats

    @property
    def tokenizer_name(self) -> str:
        """A name for tokenizer and chat template, for the harness's request cache."""
        name = str(self.tokenizer.name_or_path).replace("/", "__")
        return f"{name}-{hashlib.sha256(str(self.model.template.chat).encode()).hexdigest()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The collaboration's chat template, for the harness's results; None if chats are not rendered."""
        if isinstance(chat_template, str):
            raise ConfigError(
                f"chat template {chat_template!r} does not exist; a collaboration has one template without a name"
            )
        return self.model.template.chat if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat up to the assistant's turn, or including the last message as the beginning of that turn.

        Raises:
            RequestError: there is no chat template, or it rejects the messages.
            ConfigError: the tokenizer would add tokens before the text that training did not.
        """
        before = chat_history if add_generation_prompt else chat_history[:-1]
        text = self.model.template.render_chat(self.tokenizer, before, open_turn=True)
        if self.tok_encode(text) != tokenize(self.tokenizer, text, special=False):
            raise ConfigError(
                "the tokenizer adds special tokens before rendered chats, which training did not; "
                "add add_bos_token=false to --model_args"
            )
        return text if add_generation_prompt else text + chat_history[-1]["content"]

    # Likelihoods

    def _loglikelihood_tokens(self, requests: Sequence[Pair], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        threshold = self.policy.threshold if isinstance(self.policy, ThresholdPolicy) else self.model.threshold()
        answers: dict[int, tuple[float, bool]] = {}
        for index, views in self._views(requests, show=not disable_tqdm):
            greedy = bool(greedy_writes(views, threshold).all())
            answers[index] = (_log_likelihood(views), greedy)
            self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, in the harness's windows of `max_length` tokens."""
        windows: list[tuple[int, Pair]] = []
        for n, request in enumerate(requests):
            cut = get_rolling_token_windows(self.tok_encode(*request.args), self.prefix_token_id, self.max_length, 1)
            windows += [(n, (None, *make_disjoint_window(window))) for window in cut]
        totals = [0.0] * len(requests)
        for index, views in self._views([window for _, window in windows], show=not disable_tqdm):
            totals[windows[index][0]] += _log_likelihood(views)
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _views(self, pairs: Sequence[Pair], *, show: bool) -> Iterator[tuple[int, TokenViews]]:
        """The index of each pair and the authors' predictions for its continuation, the longest pair first."""
        examples = joined([self._example(context, continuation) for _, context, continuation in pairs])
        order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].token_ids), index))
        size = self.batch_size or AUTO_GROUP
        with progress_bar("scoring", enabled=show) as report:
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
        token_ids = [*(context or [self.prefix_token_id]), *continuation]
        kept = token_ids[-self.max_length - 1 :]
        if len(kept) < len(token_ids):
            logger.warning("a context is too long; its first %d tokens were removed", len(token_ids) - len(kept))
        begin = len(kept) - len(continuation)
        alignment = self.model.alignment
        if alignment is None:
            return Examples([Example(kept, [place >= begin for place in range(len(kept))])])
        prompts = [kept[:begin], *alignment.assistant_prompts(kept[:begin])]
        text = str(self.tokenizer.decode(continuation, clean_up_tokenization_spaces=False))
        return aligned_example(alignment, prompts, text, end=False)

    # Generation

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each prompt. With sampling, request i has the harness's torch seed + i.

        Raises:
            ConfigError: an unsupported generation option.
        """
        asked = [sampling_params(request.args[1]) for request in requests]
        prompts = [
            self._prompt(request.args[0], one.max_new_tokens) for request, one in zip(requests, asked, strict=True)
        ]
        seed = torch.initial_seed()
        draws = [self.policy.draws or one.temperature > 0 for one in asked]
        params = [replace(one, seed=seed + n) if draws[n] else one for n, one in enumerate(asked)]
        with progress_bar("generating", enabled=not disable_tqdm) as report:
            done = 0

            def keep(index: int, completion: Completion) -> None:
                nonlocal done
                done += 1
                self.cache_hook.add_partial("generate_until", requests[index].args, completion.text)
                report(done, len(requests))

            options: dict[str, Any] = {} if self.batch_size is None else {"max_batch": self.batch_size}
            found = self.model.generate(prompts, params, policy=self.policy, on_completion=keep, **options)
        return [completion.text for completion in found]

    def _prompt(self, context: str, max_new_tokens: int) -> list[int]:
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_gen_toks is {max_new_tokens}, which leaves no room for a prompt in the models' context of "
                f"{self.max_length} tokens; lower it with --gen_kwargs max_gen_toks=.."
            )
        token_ids = self.tok_encode(context) or [self.prefix_token_id]
        if len(token_ids) > room:
            logger.warning("a prompt is too long; its first %d tokens were removed", len(token_ids) - room)
        return token_ids[-room:]


def _log_likelihood(views: TokenViews) -> float:
    """The log-likelihood of all tokens together, nats."""
    logprobs = marginal_logprobs(views.base_logprob, views.assistant_logprobs, views.defer_logits)
    return float(logprobs.double().sum())
