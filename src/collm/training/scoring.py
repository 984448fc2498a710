"""Scoring: log-probability and correctness of every target token under a frozen model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from collm.core.segments import SegmentLaw, Spans, segment_logprobs, segments_correct, stop_logprobs, token_terms
from collm.errors import ArtefactError, ConfigError, MismatchError, ModelFailure
from collm.models.language_model import LanguageModel
from collm.models.members import AssistantSpec
from collm.models.tools import ToolModel
from collm.training.examples import Example, fingerprint
from collm.training.remote import RemoteModel
from collm.training.scores import Scores
from collm.training.store import HEADER, Header, ScoreStore, read_header
from collm.training.targets import (
    Shifted,
    batch_tokens_on,
    batches_by_length,
    pad,
    read_segments,
    read_targets,
    shift,
)

logger = logging.getLogger(__name__)

Scored = LanguageModel | ToolModel | RemoteModel
"""Anything that can score examples: a model in memory, a tool, or a model behind a server."""

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


def score_examples(
    model: Scored, examples: Sequence[Example], out_dir: Path, *, spec: AssistantSpec, **options: Any
) -> Scores:
    """Run `write_scores` with `options`, and load the scores."""
    write_scores(model, examples, out_dir, spec=spec, **options)
    return load_scores(out_dir, examples, spec)


def write_scores(
    model: Scored,
    examples: Sequence[Example],
    out_dir: Path,
    *,
    spec: AssistantSpec,
    max_batch_tokens: int | None = None,
    shard_size: int = SHARD_SIZE,
    hidden_states: bool = False,
    process: int = 0,
    num_processes: int = 1,
    progress: OnProgress | None = None,
) -> None:
    """Score every target token: its log-probability, and whether it is the model's argmax.

    Examples are batched by length, and scores are written in shards. An interrupted run continues after its last
    complete shard with the same batches, and ends with the same bytes.

    Args:
        model: the frozen model, a tool, or a model behind a server.
        examples: the examples to score.
        out_dir: directory of the scores; may contain the beginning of the same run.
        spec: source of the model, which identifies its scores.
        max_batch_tokens: largest number of tokens per batch with padding; by default 512 on a CPU, 16,384 elsewhere.
        shard_size: examples per shard.
        hidden_states: also store the model's last hidden states at the target tokens, H numbers each in the model's
            dtype. Requires a model in memory.
        process, num_processes: write every `num_processes`-th shard, starting with number `process`.
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
    header = Header.of(examples, spec, vocab_size=model.vocab_size, shard_size=shard_size, hidden_states=hidden_states)
    store = _store(out_dir, header, examples)
    store.begin()
    assigned = list(enumerate(store.shards))[process::num_processes]
    advance = _progress_counter(examples, [index for _, indices in assigned for index in indices], progress)
    stops = [_fill_shard(model, examples, store, shard, max_batch_tokens, advance) for shard, _ in assigned]
    _check_stops(model.name, [one for one in stops if one is not None])


def _progress_counter(
    examples: Sequence[Example], indices: Sequence[int], progress: OnProgress | None
) -> Callable[[Sequence[int]], None]:
    """Return a function that takes finished examples and reports the number of finished tokens and the total."""
    total = sum(len(examples[index].token_ids) - 1 for index in indices)
    done = 0

    def advance(finished: Sequence[int]) -> None:
        nonlocal done
        done += sum(len(examples[index].token_ids) - 1 for index in finished)
        if progress is not None:
            progress(done, total)

    return advance


def _fill_shard(
    model: Scored,
    examples: Sequence[Example],
    store: ScoreStore,
    shard: int,
    max_batch_tokens: int | None,
    advance: Callable[[Sequence[int]], None],
) -> Tensor | None:
    """Score a shard unless it is complete. Returns log P(START) after each newly scored segment, or None."""
    indices = store.shards[shard]
    if _is_intact(store, shard):
        advance(indices)
        return None
    found, stops = _score_shard(model, examples, indices, max_batch_tokens, advance, store.header.hidden_states)
    store.write(shard, *found)
    return stops


def read_scores(model: Scored, examples: Sequence[Example], *, hidden_states: bool = False) -> list[Tensor]:
    """Score like `write_scores`, but in memory.

    Returns:
        For all target tokens, example by example: log-probabilities in nats, shape (M,), whether each is the model's
        argmax, shape (M,), and optionally the last hidden states, shape (M, H).

    Raises:
        ConfigError, MismatchError, ModelFailure, ToolFailure: as in `write_scores`.
    """
    _check_fits(model, examples)
    return _score_shard(model, examples, range(len(examples)), None, lambda indices: None, hidden_states)[0]


def _score_shard(
    model: Scored,
    examples: Sequence[Example],
    indices: Sequence[int],
    max_batch_tokens: int | None,
    advance: Callable[[Sequence[int]], None],
    hidden_states: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """Score examples in batches, returning results in the order of `indices`.

    Returns:
        Log-probabilities, correctness and optionally hidden states; and for segments log P(START) after each, or None.
    """
    results: dict[int, tuple[Tensor, ...]] = {}
    for batch in _batches(model, examples, indices, max_batch_tokens):
        results.update(zip(batch, _score_batch(model, examples, batch, hidden_states), strict=True))
        advance(batch)
    found = [torch.cat(values) for values in zip(*(results[index] for index in indices), strict=True)]
    return found, found.pop(2) if examples[indices[0]].segments is not None else None


def _check_stops(name: str, stops: Sequence[Tensor]) -> None:
    """Log a warning about an assistant that tends to continue past the end of segments."""
    logprobs = torch.cat([torch.zeros(0), *stops])
    if len(logprobs) and logprobs.mean() < LOW_STOP:
        logger.warning(
            "%s gives the end of a segment a log-probability of %.1f nats on average, expected more than %.0f: "
            "it will often write past the end of a segment; train it on such texts or use another assistant",
            name,
            logprobs.mean(),
            LOW_STOP,
        )


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


def _batches(
    model: Scored, examples: Sequence[Example], indices: Sequence[int], max_batch_tokens: int | None
) -> list[list[int]]:
    """Batches by length for a model in memory; a single one for servers and tools, which do not need batches."""
    if not isinstance(model, LanguageModel):
        return [list(indices)]
    max_batch_tokens = max_batch_tokens or batch_tokens_on(model.device)
    batches = batches_by_length([len(examples[index].token_ids) for index in indices], max_batch_tokens)
    return [[indices[place] for place in batch] for batch in batches]


def _score_batch(
    model: Scored, examples: Sequence[Example], indices: Sequence[int], hidden_states: bool = False
) -> list[tuple[Tensor, ...]]:
    """Scores of each example, on the CPU: log-probabilities, correctness and optionally hidden states."""
    if isinstance(model, RemoteModel):
        return [*model.score([examples[index] for index in indices], numbers=indices)]
    if isinstance(model, ToolModel):
        return [_score_tool(model, examples[index]) for index in indices]
    shifted = [shift(examples[index]) for index in indices]
    counts = [int(one.mask.sum()) for one in shifted]
    segments = examples[indices[0]].segments
    try:
        read = _read_batch(model, shifted, hidden_states, None if segments is None else segments.law)
    except Exception as error:
        what = f"{type(error).__name__} while it read {len(indices)} examples at once"
        raise ModelFailure(f"{model.name} raised {what}: {error}") from error
    by_example = list(zip(*(torch.split(values, counts) for values in read), strict=True))
    for index, (values, *_) in zip(indices, by_example, strict=True):
        if values.isnan().any():
            raise ModelFailure(
                f"{model.name} returned NaN logits for example {index} (at its target token "
                f"{int(values.isnan().nonzero()[0])}); check its weights and dtype"
            )
    return by_example


def _score_tool(model: ToolModel, example: Example) -> tuple[Tensor, ...]:
    if example.segments is None:
        return model.score(example.token_ids, example.is_target)
    law, shifted = example.segments.law, shift(example)
    assert shifted.rows is not None
    at = (shifted.scored | (shifted.rows >= 0)).nonzero().squeeze(-1)
    gold, rows = shifted.gold[at], shifted.rows[at]
    logits = model.logits(model.next_tokens(example.token_ids, (at + 1).tolist()))
    spans = Spans.of(gold, rows, shifted.scored[at], law)
    terms = token_terms(logits, gold, rows, law)
    abstains = logits.amax(-1) == logits.amin(-1)
    terms = terms._replace(  # a tool ends its segment by abstaining
        correct=terms.correct & ~abstains,
        stops=terms.stops | abstains,
        log_start=terms.log_start.masked_fill(abstains, 0.0),
    )
    return segment_logprobs(terms, spans), segments_correct(terms, spans), stop_logprobs(terms, spans)


def _read_batch(
    model: LanguageModel, shifted: Sequence[Shifted], hidden_states: bool, law: SegmentLaw | None
) -> list[Tensor]:
    training = model.module.training
    model.module.eval()
    try:
        with torch.inference_mode():
            batch = pad(shifted).to(model.input_device)
            states = model.hidden_states(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            hidden = states[batch.mask.to(states.device)]
            if batch.rows is None or law is None:
                read = read_targets(model, hidden, batch.gold[batch.mask])
            else:
                at = batch.read
                inputs_read = batch.gold[at], batch.rows[at], batch.scored[at]
                read = read_segments(model, states[at.to(states.device)], *inputs_read, law)
            return [values.cpu() for values in (*read, *([hidden] if hidden_states else []))]
    finally:
        model.module.train(training)
