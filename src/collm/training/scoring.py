"""Scoring: log-probability and correctness of every target token under a frozen model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from collm.core.segments import segment_scores, token_terms
from collm.errors import ArtefactError, ConfigError, MismatchError, ModelFailure
from collm.models.language_model import LanguageModel
from collm.models.members import AssistantSpec
from collm.models.tools import ToolModel
from collm.training.examples import Example, Segments, fingerprint
from collm.training.remote import RemoteModel
from collm.training.scores import Scores
from collm.training.store import HEADER, Header, ScoreStore, read_header
from collm.training.targets import (
    batch_tokens_on,
    batches_by_length,
    collate,
    needs_logits,
    read_segments,
    read_targets,
    shift,
)

logger = logging.getLogger(__name__)

Scored = LanguageModel | ToolModel | RemoteModel
"""Anything that can score examples: a model in memory, a tool, or a model behind a server."""

TensorsByName = dict[str, Tensor]

OnProgress = Callable[[int, int], None]
"""Called with the number of finished tokens and the total."""

LOW_STOP = -2.0
"""Mean log P(START) after segments, in nats, below which a warning about an assistant is logged."""

SHARD_SIZE = 256
"""Examples per shard, and so the most work that an interrupt can lose."""


@contextmanager
def progress_bar(description: str, *, enabled: bool = True) -> Iterator[OnProgress]:
    """Show a progress bar on stderr, if enabled, and yield the callback that updates it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def write_scores(
    model: Scored,
    examples: Sequence[Example],
    out_dir: Path,
    *,
    spec: AssistantSpec,
    max_batch_tokens: int | None = None,
    hidden_states: bool = False,
    share: tuple[int, int] = (0, 1),
    progress: OnProgress | None = None,
) -> None:
    """Score every target token: its log-probability, whether it is the model's argmax, and whether a tool abstains.

    Examples are batched by length, and scores are written in shards. An interrupted run continues after its last
    complete shard with the same batches, and ends with the same bytes.

    Args:
        model: the frozen model, a tool, or a model behind a server.
        examples: the examples to score.
        out_dir: directory of the scores; may contain the beginning of the same run.
        spec: source of the model, which identifies its scores.
        max_batch_tokens: largest number of tokens per batch with padding; by default 512 on a CPU, 16,384 elsewhere.
        hidden_states: also store the model's last hidden states at the target tokens, H numbers each in the model's
            dtype. Requires a model in memory.
        share: number of this process, and number of processes that share the work; each writes its shards.
        progress: called after each batch, with the tokens of these shards.

    Raises:
        ConfigError: `out_dir` has scores of other examples or another model (the message names the field), an example
            exceeds the model's context, or the model has no hidden states to store.
        MismatchError: the model does not have a token id.
        ModelFailure: the model raised or returned NaN logits; the message names the model and, for NaN, the example.
        ToolFailure: a tool raised an exception, hung or returned something other than text; with its input.
        WriteError: a write failed; complete shards remain.
    """
    _check_fits(model, examples)
    if hidden_states and not isinstance(model, LanguageModel):
        raise ConfigError(f"{model.name} returns no hidden states to store; use a model in memory")
    header = Header.of(examples, spec, vocab_size=model.vocab_size, shard_size=SHARD_SIZE, hidden_states=hidden_states)
    store = _store(out_dir, header, examples)
    store.begin()
    _fill(store, range(share[0], len(store.shards), share[1]), model, examples, max_batch_tokens, progress)


def _fill(
    store: ScoreStore,
    shards: Iterable[int],
    model: Scored,
    examples: Sequence[Example],
    max_batch_tokens: int | None,
    progress: OnProgress | None,
) -> None:
    """Score those of these shards that are not complete."""

    def tokens(indices: Iterable[int]) -> int:
        return sum(len(examples[index].token_ids) - 1 for index in indices)

    left = [shard for shard in shards if not _is_intact(store, shard)]
    total = sum(tokens(store.shards[shard]) for shard in shards)
    done = total - sum(tokens(store.shards[shard]) for shard in left)
    if progress is not None:
        progress(done, total)
    stops = list[Tensor]()
    for shard in left:
        found = dict[int, TensorsByName]()
        for batch, scores in _score(
            model, examples, store.shards[shard], max_batch_tokens, hidden_states=store.header.hidden_states
        ):
            found.update(zip(batch, scores, strict=True))
            done += tokens(batch)
            if progress is not None:
                progress(done, total)
        tensors = _joined([found[index] for index in store.shards[shard]])
        if "log_stop" in tensors:
            stops.append(tensors.pop("log_stop"))
        store.write(shard, tensors)
    if stops and (mean := torch.cat(stops).mean()) < LOW_STOP:
        logger.warning(
            "%s gives the end of a segment a log-probability of %.1f nats on average, expected more than %.0f: "
            "it will often write past the end of a segment; train it on such texts or use another assistant",
            model.name,
            mean,
            LOW_STOP,
        )


def read_scores(model: Scored, examples: Sequence[Example], *, hidden_states: bool = False) -> TensorsByName:
    """Score like `write_scores`, but in memory.

    Returns:
        For all target tokens, example by example: logprob, in nats, shape (M,); correct, whether each is the model's
        argmax, shape (M,); for a tool also abstained, shape (M,); and optionally hidden, the last hidden states,
        shape (M, H).

    Raises:
        ConfigError, MismatchError, ModelFailure, ToolFailure: as in `write_scores`.
    """
    _check_fits(model, examples)
    found = dict[int, TensorsByName]()
    for batch, scores in _score(model, examples, range(len(examples)), None, hidden_states=hidden_states):
        found.update(zip(batch, scores, strict=True))
    tensors = _joined([found[index] for index in range(len(examples))])
    tensors.pop("log_stop", None)
    return tensors


def _joined(scores: Sequence[TensorsByName]) -> TensorsByName:
    return {name: torch.cat([one[name] for one in scores]) for name in scores[0]}


def find_scores(
    directory: Path, examples: Sequence[Example], spec: AssistantSpec | None = None, *, hidden_states: bool = False
) -> Scores | None:
    """Load the scores in a directory, or return None if they are incomplete.

    Args:
        spec: expected source of the scored model, if given.
        hidden_states: whether the scores must include hidden states.

    Raises:
        ConfigError: the scores are of other examples or another model, or lack hidden states.
        ArtefactError: scores.json is damaged.
    """
    header = read_header(directory)
    if header is None:
        return None
    wanted: dict[str, Any] = {"fingerprint": fingerprint(examples)}
    if spec is not None:
        wanted |= spec.identity()
    if hidden_states:
        wanted["hidden_states"] = True
    header.check_same(wanted, directory)
    store = _store(directory, header, examples)
    whole = all(_is_intact(store, shard) for shard in range(len(store.shards)))
    return store.collect() if whole else None


def load_scores(directory: Path, examples: Sequence[Example], spec: AssistantSpec | None = None) -> Scores:
    """Load the complete scores in a directory, checked against the examples.

    Raises:
        ConfigError: as in `find_scores`.
        ArtefactError: the scores are missing, incomplete or damaged.
    """
    if read_header(directory) is None:
        raise ArtefactError(f"there are no scores in {directory}: no {HEADER}; run 'collm score' first")
    scores = find_scores(directory, examples, spec)
    if scores is None:
        raise ArtefactError(
            f"the scores in {directory} are incomplete or damaged; run the same 'collm score' again with the same "
            "--out, which computes the missing ones"
        )
    return scores


def _store(directory: Path, header: Header, examples: Sequence[Example]) -> ScoreStore:
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].token_ids), index))
    return ScoreStore(directory, header, order, [example.num_targets for example in examples])


def _is_intact(store: ScoreStore, shard: int) -> bool:
    try:
        return store.read(shard) is not None
    except ArtefactError as error:
        logger.warning("%s", error)
        return False


def _check_fits(model: Scored, examples: Sequence[Example]) -> None:
    for index, example in enumerate(examples):
        length, largest = len(example.token_ids) - 1, max(example.token_ids)
        if model.max_length is not None and length > model.max_length:
            raise ConfigError(
                f"example {index} has {length} tokens to read, but {model.name} reads at most {model.max_length}; "
                "lower max_length"
            )
        if largest >= model.vocab_size:
            raise MismatchError(
                f"example {index} has token id {largest}, but {model.name} has ids below {model.vocab_size}; "
                "the examples were made with another tokenizer"
            )


def _score(
    model: Scored,
    examples: Sequence[Example],
    indices: Sequence[int],
    max_batch_tokens: int | None,
    *,
    hidden_states: bool,
) -> Iterator[tuple[Sequence[int], list[TensorsByName]]]:
    """Yield the indices of a batch of examples and the scores of each of them, on the CPU.

    Scores are logprob, correct and optionally hidden; for a tool also abstained; for segments also log_stop, log
    P(START) after each.
    """
    if isinstance(model, RemoteModel):
        pairs = model.score([examples[index] for index in indices], numbers=indices)
        yield indices, [{"logprob": logprob, "correct": correct} for logprob, correct in pairs]
    elif isinstance(model, ToolModel):
        for index in indices:
            yield [index], [_read_tool(model, examples[index])]
    else:
        lengths = [len(examples[index].token_ids) for index in indices]
        for places in batches_by_length(lengths, max_batch_tokens or batch_tokens_on(model.device)):
            batch = [indices[place] for place in places]
            yield batch, _read_batch(model, examples, batch, hidden_states=hidden_states)


def _read_tool(model: ToolModel, example: Example) -> TensorsByName:
    if example.segments is None:
        scores = model.score(example.token_ids, example.is_target)
        return dict(zip(("logprob", "correct", "abstained"), scores, strict=True))
    law, batch = example.segments.law, shift(example)
    at = needs_logits(batch).nonzero().squeeze(-1)
    gold, rows, scored = (batch[name][at] for name in ("gold", "rows", "scored"))
    next_tokens = model.next_tokens(example.token_ids, (at + 1).tolist())
    abstains = torch.tensor([token is None for token in next_tokens])
    terms = token_terms(model.logits(next_tokens), gold, rows, law)
    terms = terms._replace(  # a tool ends its segment by abstaining
        correct=terms.correct & ~abstains,
        stops=terms.stops | abstains,
        log_start=terms.log_start.masked_fill(abstains, 0.0),
    )
    logprob, correct, log_stop = segment_scores(terms, gold, rows, scored, law)
    abstained = abstains[(rows >= 0) & scored]  # where it does not begin the segment, the base writes it
    return {"logprob": logprob, "correct": correct, "abstained": abstained, "log_stop": log_stop}


def _read_batch(
    model: LanguageModel, examples: Sequence[Example], indices: Sequence[int], *, hidden_states: bool
) -> list[TensorsByName]:
    """The scores of each example of one forward pass."""
    batch = collate([shift(examples[index]) for index in indices])
    counts = batch["target_mask"].sum(-1).tolist()
    training = model.module.training
    model.module.eval()
    try:
        with torch.inference_mode():
            scores = _read_targets(model, batch, examples[indices[0]].segments)
    except Exception as error:
        what = f"{type(error).__name__} while it read {len(indices)} examples at once"
        raise ModelFailure(f"{model.name} raised {what}: {error}") from error
    finally:
        model.module.train(training)
    if not hidden_states:
        del scores["hidden"]
    parts = {name: torch.split(values.cpu(), counts) for name, values in scores.items()}
    for index, logprob in zip(indices, parts["logprob"], strict=True):
        if logprob.isnan().any():
            raise ModelFailure(
                f"{model.name} returned NaN logits for example {index} (at its target token "
                f"{int(logprob.isnan().nonzero()[0])}); check its weights and dtype"
            )
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _read_targets(model: LanguageModel, batch: TensorsByName, segments: Segments | None) -> TensorsByName:
    batch = {name: values.to(model.input_device) for name, values in batch.items()}
    states = model.hidden_states(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    hidden = states[batch["target_mask"].to(states.device)]
    if segments is None:
        logprob, correct = read_targets(model, hidden, batch["gold"][batch["target_mask"]])
        return {"logprob": logprob, "correct": correct, "hidden": hidden}
    at = needs_logits(batch)
    gold, rows, scored = (batch[name][at] for name in ("gold", "rows", "scored"))
    logprob, correct, log_stop = read_segments(model, states[at.to(states.device)], gold, rows, scored, segments.law)
    return {"logprob": logprob, "correct": correct, "log_stop": log_stop, "hidden": hidden}
