"""Scoring: log-probability and correctness of every target token under a frozen model."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from collm.core.head import doubt_of
from collm.core.segments import SegmentLaw, TokenTerms, segment_scores, token_terms
from collm.errors import ArtefactError, ConfigError, MismatchError, ModelFailure
from collm.models.language_model import LanguageModel
from collm.models.llama import MAX_BATCH, LlamaContext, LlamaModel, LlamaToken
from collm.models.members import AssistantSpec, Model
from collm.models.tools import ToolModel
from collm.redaction import visible
from collm.training.examples import Example, batch_tokens_on, batches_by_length, collate, longest_first, shift
from collm.training.remote import RemoteModel
from collm.training.scores import Header, read_shard, shard_path, write_shard

logger = logging.getLogger(__name__)

Scored = Model | ToolModel | RemoteModel  # a model in memory, a tool, or a model behind a server
OnProgress = Callable[[int, int], None]  # called with the number of finished tokens and the total
LINE_SECONDS = 10  # between two lines of progress
LOW_STOP = -2.0  # a warning about an assistant is logged if mean log P(START) after segments, in nats, is below this
MAX_LOGITS = 2**25  # in memory at once; 128 MB in fp32
SHARD_SIZE = 256  # examples, and so the most work that an interrupt can lose


@contextmanager
def progress_bar(description: str, unit: str = "tokens", *, enabled: bool = True) -> Iterator[OnProgress]:
    """Show progress on stderr, if enabled, and yield the callback that updates it.

    On a terminal it is a bar, elsewhere `progress_lines`. `unit` is what is counted, in the plural.
    """
    console = Console(stderr=True)
    if not enabled:
        yield lambda done, total: None
    elif not console.is_terminal:
        yield progress_lines(description, unit)
    else:
        counts = TextColumn("{task.completed:,} of {task.total:,} " + unit)
        columns = TextColumn("{task.description}", markup=False), BarColumn(), counts, TimeRemainingColumn()
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(visible(description), total=0)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def progress_lines(description: str, unit: str) -> OnProgress:
    """A callback that writes lines to stderr: at the beginning, then at most every 10 seconds, and at the end."""
    started, written, last = time.monotonic(), -math.inf, (0, 0)

    def report(done: int, total: int) -> None:
        nonlocal written, last
        now, is_end = time.monotonic(), done == total and last != (done, total)
        last = done, total
        if now - written < LINE_SECONDS and not is_end:
            return
        written, left = now, round((now - started) * (total - done) / max(done, 1))
        remaining = f", about {timedelta(seconds=left)} left" if done and left else ""
        sys.stderr.write(visible(f"{description}: {done:,} of {total:,} {unit}{remaining}\n"))

    return report


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set a module's evaluation mode for the duration of the block."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def write_scores(
    model: Scored,
    examples: Sequence[Example],
    out_dir: Path,
    *,
    spec: AssistantSpec,
    max_batch_tokens: int | None = None,
    hidden_states: bool = False,
    share: tuple[int, int] = (0, 1),
    progress: OnProgress = lambda done, total: None,
) -> None:
    """Score every target token: its log-probability, whether it is the model's argmax, and whether a tool abstains.

    Examples are batched by length, and scores are written in shards. An interrupted run continues after its last
    complete shard with the same batches, and ends with the same bytes.

    Args:
        spec: source of the model, which identifies its scores.
        max_batch_tokens: largest number of tokens per batch with padding; by default 512 on a CPU, 16,384 elsewhere.
        hidden_states: also store the last hidden states of a model in memory at the target tokens, in its dtype, and
            its doubt there (`doubt_of`).
        share: number of this process, and number of processes that share the work; each writes its shards.
    """
    _check_fits(model, examples, hidden_states=hidden_states)
    header = Header.of(examples, spec, vocab_size=model.vocab_size, shard_size=SHARD_SIZE, hidden_states=hidden_states)
    header.write(out_dir)
    order = longest_first([len(example.token_ids) for example in examples])
    shards = [order[at : at + SHARD_SIZE] for at in range(0, len(order), SHARD_SIZE)]
    own = [*enumerate(shards)][share[0] :: share[1]]
    done, total = 0, _num_read(examples[index] for _, indices in own for index in indices)

    def report(read: int) -> None:
        progress(done + read, total)

    report(0)
    stops = list[Tensor]()
    for number, indices in own:
        shard = {index: examples[index] for index in indices}
        offsets = torch.tensor([0, *(example.num_targets for example in shard.values())]).cumsum(0)
        layout = {"examples": torch.tensor(indices), "offsets": offsets}
        if not _is_complete(out_dir, header, number, layout):
            scores = _score(model, shard, max_batch_tokens, hidden_states=hidden_states, report=report)
            stops.append(scores.pop("log_stop", torch.empty(0)))
            write_shard(out_dir, header, number, scores | layout)
        done += _num_read(shard.values())
        report(0)
    if stops and (mean := torch.cat(stops).mean()) < LOW_STOP:
        found = f"a log-probability of {mean:.1f} nats on average, expected more than {LOW_STOP:.0f}"
        effect = "it will often write past the end of a segment; train it on such texts or use another assistant"
        logger.warning(f"{model.name} gives the end of a segment {found}: {effect}")


def read_scores(
    model: Scored,
    examples: Sequence[Example],
    *,
    hidden_states: bool = False,
    logprobs: bool = True,
    progress: OnProgress = lambda done, total: None,
) -> dict[str, Tensor]:
    """Score like `write_scores`, but in memory.

    Returns:
        logprob (nats), correct, and abstained for a tool or predicted for tokens of a model, of all targets, example by
        example, shape (M,), and optionally hidden, the hidden states, shape (M, H), and doubt, shape (M, 3). Without
        `logprobs` hidden alone.
    """
    _check_fits(model, examples, hidden_states=hidden_states)
    shard, total = dict(enumerate(examples)), _num_read(examples)
    options = {"hidden_states": hidden_states, "logprobs": logprobs}
    scores = _score(model, shard, report=lambda read: progress(read, total), **options)
    scores.pop("log_stop", None)
    return scores


def _num_read(examples: Iterable[Example]) -> int:
    return sum(len(example.token_ids) - 1 for example in examples)


def _is_complete(directory: Path, header: Header, shard: int, layout: dict[str, Tensor]) -> bool:
    try:
        found = read_shard(directory, header, shard) if shard_path(directory, shard).exists() else None
    except ArtefactError as error:
        logger.warning("%s", error)
        return False
    return found is not None and all(torch.equal(found[name], values) for name, values in layout.items())


def _check_fits(model: Scored, examples: Sequence[Example], *, hidden_states: bool) -> None:
    if hidden_states and isinstance(model, ToolModel | RemoteModel):
        raise ConfigError(f"{model.name} returns no hidden states to store; use a model in memory")
    for index, example in enumerate(examples):
        length, largest = len(example.token_ids) - 1, max(example.token_ids)
        if model.max_length is not None and length > model.max_length:
            limit = f"{model.name} reads at most {model.max_length}"
            raise ConfigError(f"example {index} has {length} tokens to read, but {limit}; lower max_length")
        if largest >= model.vocab_size:
            known = f"{model.name} has ids below {model.vocab_size}"
            raise MismatchError(
                f"example {index} has token id {largest}, but {known}; it was made with another tokenizer"
            )


def _score(
    model: Scored,
    examples: Mapping[int, Example],
    max_batch_tokens: int | None = None,
    *,
    hidden_states: bool,
    logprobs: bool = True,
    report: Callable[[int], None],
) -> dict[str, Tensor]:
    """As `read_scores`, for numbered examples, and for segments also log_stop. `report` gets the tokens read so far."""
    found, num_read, numbers = dict[int, dict[str, Tensor]](), 0, [*examples]
    largest = sys.maxsize if isinstance(model, RemoteModel) else 1  # tokens of a batch
    if isinstance(model, LanguageModel):
        largest = max_batch_tokens or batch_tokens_on(model.device)
    elif isinstance(model, LlamaModel):
        longest = max(len(example.token_ids) for example in examples.values())
        context = LlamaContext(model, positions=longest)
    for places in batches_by_length([len(example.token_ids) for example in examples.values()], largest):
        batch = {numbers[place]: examples[numbers[place]] for place in places}
        if isinstance(model, RemoteModel):
            pairs = model.score([*batch.values()], numbers=[*batch])
            scores = [{"logprob": logprob, "correct": correct} for logprob, correct in pairs]
        elif isinstance(model, ToolModel):
            scores = [_tool_scores(model, example) for example in batch.values()]
        elif isinstance(model, LlamaModel):
            scores = [_read_llama(context, number, example, hidden=hidden_states) for number, example in batch.items()]
        else:
            scores = _read_batch(model, batch, hidden_states=hidden_states, logprobs=logprobs)
        found.update(zip(batch, scores, strict=True))
        num_read += _num_read(batch.values())
        report(num_read)
    return {name: torch.cat([found[number][name] for number in numbers]) for name in found[numbers[0]]}


def tool_likelihoods(model: ToolModel, examples: Iterable[Example]) -> dict[str, Tensor]:
    """Read a tool as `read_scores` does, but under the law that decodes. Where it abstains, the base writes instead."""
    found = [_tool_scores(model, example, decoded=True) for example in examples]
    return {name: torch.cat([one[name] for one in found]) for name in ("logprob", "correct", "abstained")}


def _tool_scores(model: ToolModel, example: Example, *, decoded: bool = False) -> dict[str, Tensor]:
    """Training scores of an example, or with `decoded` its likelihoods under the law that decodes."""
    if example.law is None and not decoded:
        scores = model.score(example.token_ids, example.is_target)
        return dict(zip(("logprob", "correct", "abstained"), scores, strict=True))
    law, batch = example.law, shift(example)
    at = needs_logits(batch).nonzero().squeeze(-1)
    next_tokens = model.next_tokens(example.token_ids, (at + 1).tolist())
    abstains = torch.tensor([token is None for token in next_tokens])
    if law is None:
        hit, miss, _ = model.logprobs
        correct = torch.tensor([-1 if token is None else token for token in next_tokens]) == batch["gold"][at]
        return {"logprob": torch.where(correct, hit, miss), "correct": correct, "abstained": abstains}
    gold, rows, scored = (batch[name][at] for name in ("gold", "rows", "scored"))
    terms = token_terms(model.logits(next_tokens), gold, rows, law)
    terms = terms._replace(  # a tool ends its segment by abstaining
        logprob=terms.logprob.masked_fill(abstains & (rows < 0) & decoded, -torch.inf),
        correct=terms.correct & ~abstains,
        stops=terms.stops | abstains,
        log_start=terms.log_start.masked_fill(abstains, 0.0),
    )
    # where it does not begin the segment, the base writes it
    return {**segment_scores(terms, gold, rows, scored, law), "abstained": abstains[(rows >= 0) & scored]}


def _read_batch(
    model: LanguageModel, examples: Mapping[int, Example], *, hidden_states: bool, logprobs: bool
) -> list[dict[str, Tensor]]:
    """The scores of each example of one forward pass."""
    batch, law = collate([*map(shift, examples.values())]), next(iter(examples.values())).law
    counts = batch["target_mask"].sum(-1).tolist()
    try:
        with evaluating(model.module), torch.inference_mode():
            batch = {name: values.to(model.input_device) for name, values in batch.items()}
            states = model.hidden_states(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            scores = read_gold(model, states, batch, law, doubt=hidden_states) if logprobs else {}
            if hidden_states:
                scores["hidden"] = states[batch["target_mask"].to(states.device)]
    except Exception as error:
        what = f"{type(error).__name__} while it read {len(examples)} examples at once"
        raise ModelFailure(f"{model.name} raised {what}: {error}") from error
    parts = {name: torch.split(values.cpu(), counts) for name, values in scores.items()}
    for number, logprob in zip(examples, parts.get("logprob", ()), strict=False):
        if logprob.isnan().any():
            place = f"example {number} (at its target token {int(logprob.isnan().nonzero()[0])})"
            raise ModelFailure(f"{model.name} returned NaN logits for {place}; check its weights and dtype")
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


@torch.inference_mode()
def _read_llama(context: LlamaContext, number: int, example: Example, *, hidden: bool) -> dict[str, Tensor]:
    """The scores of one example, always in the same calls of llama.cpp, so that they have the same bits."""
    batch, states = shift(example), list[Tensor]()
    at = needs_logits(batch)
    context.cut(0, 0)

    def parts() -> Iterator[Tensor]:
        places = [LlamaToken(0, position, token_id, True) for position, token_id in enumerate(example.token_ids[:-1])]
        for start in range(0, len(places), MAX_BATCH):
            part = slice(start, start + MAX_BATCH)
            wanted = [place._replace(wanted=bool(at[place.position])) for place in places[part]]
            logits, states_of_part = context.decode(wanted, hidden=hidden and any(one.wanted for one in wanted))
            states.extend(() if states_of_part is None else (states_of_part,))
            yield logits

    scores = _gold_scores(parts(), lambda logits: logits, batch, example.law, doubt=hidden, device=at.device)
    if scores["logprob"].isnan().any():
        raise ModelFailure(f"{context.model.name} returned NaN logits for example {number}; check its weights")
    return scores | {"hidden": torch.cat(states)[batch["target_mask"][at]]} if hidden else scores


def read_gold(
    model: LanguageModel,
    hidden: Tensor,
    batch: Mapping[str, Tensor],
    law: SegmentLaw | None = None,
    doubt: bool = False,
) -> dict[str, Tensor]:
    """Score the D targets of a batch. At most `MAX_LOGITS` logits are in memory; gradients recompute them.

    Args:
        hidden: last hidden states, shape (B, T, H).
        batch: the tensors of `shift`, shape (B, T).
        law: the model's tokens that begin a segment, if models have different tokenizers.
        doubt: also return the doubt.

    Returns:
        logprob of the gold token or segment, nats, fp32; correct, whether it is the argmax or what greedy decoding
        writes, bool; for tokens also predicted, the argmax, int32; for segments log_stop, log P(START) after each, nats
        (`core.segments`); shape (D,) each. Optionally doubt, the model's doubt where the author is chosen (`doubt_of`),
        without gradient, shape (D, 3).
    """
    states = hidden[needs_logits(batch).to(hidden.device)]
    parts = torch.split(states, max(1, MAX_LOGITS // model.vocab_size))
    return _gold_scores(parts, model.logits, batch, law, doubt=doubt, device=model.device)


def _gold_scores(
    parts: Iterable[Tensor],
    logits_of: Callable[[Tensor], Tensor],
    batch: Mapping[str, Tensor],
    law: SegmentLaw | None,
    *,
    doubt: bool,
    device: torch.device,
) -> dict[str, Tensor]:
    """As `read_gold`, from consecutive parts of the positions that need logits. The logits are on the device."""
    at = needs_logits(batch)
    columns = {name: batch[name][at].to(device) for name in ("gold", "rows", "scored", "target_mask") if name in batch}
    law, gold = law and law.to(device), columns["gold"]

    def read(part: Tensor, own: slice) -> tuple[Tensor, ...]:
        logits = logits_of(part)
        doubts = (doubt_of(logits),) if doubt else ()
        if law is not None:
            return *token_terms(logits.float(), gold[own], columns["rows"][own], law), *doubts
        return -F.cross_entropy(logits.float(), gold[own], reduction="none"), logits.argmax(-1), *doubts

    found, done = list[tuple[Tensor, ...]](), 0
    for part in parts:
        own = slice(done, done := done + len(part))
        found.append(checkpoint(read, part, own, use_reentrant=False) if torch.is_grad_enabled() else read(part, own))
    terms = [torch.cat(values) for values in zip(*found, strict=True)]
    doubts = {"doubt": terms.pop()[columns["target_mask"]]} if doubt else {}
    if law is not None:
        return segment_scores(TokenTerms(*terms), gold, columns["rows"], columns["scored"], law) | doubts
    logprob, argmax = terms
    return {"logprob": logprob, "correct": argmax == gold, "predicted": argmax.int(), **doubts}


def needs_logits(batch: Mapping[str, Tensor]) -> Tensor:
    """Where logits are needed: at targets, and where a segment begins, as the one before ends there, shape (B, T)."""
    return batch["scored"] | (batch["rows"] >= 0) if "rows" in batch else batch["target_mask"]
