"""Scoring: what one frozen model says about every target token of a set of examples."""

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
"""What can be scored: a model in memory, a tool, or a model behind a server."""

OnProgress = Callable[[int, int], None]
"""Called with tokens done and tokens in all."""

LOW_STOP = -2.0
"""Mean log P(START) behind segments, in nats, below which an assistant is warned of."""

SHARD_SIZE = 256
"""Examples to a shard: what a kill can cost."""


@contextmanager
def progress_bar(description: str, *, enabled: bool = True) -> Iterator[OnProgress]:
    """A progress bar on stderr, as the callback that drives it; silent where not enabled."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def score_examples(
    model: Scored, examples: Sequence[Example], out_dir: Path, *, spec: AssistantSpec, **options: Any
) -> Scores:
    """Score every target token as `write_scores` does, which takes the options, and read the scores."""
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

    Examples are batched by length. What is done is kept in shards, so a run that was killed goes on after its last
    whole shard, with the batches it would have had, and ends with the same bytes.

    Args:
        model: the frozen model, a tool, or a model behind a server.
        examples: what to score.
        out_dir: where the scores lie; may hold the beginning of the same run.
        spec: where the model came from, the part of its identity that is compared.
        max_batch_tokens: most tokens in a batch, padding included; by default 512 on a CPU, 16,384 elsewhere.
        shard_size: examples to a shard.
        hidden_states: also keep the model's last hidden states at the target tokens: H numbers for each, in the
            model's dtype. Only of a model in memory.
        process, num_processes: write every `num_processes`-th shard, from number `process` on.
        progress: called after each batch, with the tokens of these shards.

    Raises:
        ConfigError: `out_dir` holds scores of other examples or another model; the field that differs is named. Or
            an example is longer than the model reads, or hidden states are asked of what shows none.
        MismatchError: a token id the model does not have.
        ModelFailure: NaN logits, naming the model and the example.
        ToolFailure: a tool raised, hung or returned no text; with the text it failed on.
        WriteError: the disk refused; whole shards remain.
    """
    _check_fits(model, examples)
    if hidden_states and not isinstance(model, LanguageModel):
        raise ConfigError(f"{model.name} shows no hidden states; keep those of a model in memory")
    header = Header.of(examples, spec, vocab_size=model.vocab_size, shard_size=shard_size, hidden_states=hidden_states)
    store = _store(out_dir, header, examples)
    store.begin()
    mine = list(enumerate(store.shards))[process::num_processes]
    advance = _advancing(examples, [index for _, indices in mine for index in indices], progress)
    stops = [_fill_shard(model, examples, store, shard, max_batch_tokens, advance) for shard, _ in mine]
    _check_stops(model.name, [one for one in stops if one is not None])


def _advancing(
    examples: Sequence[Example], indices: Sequence[int], progress: OnProgress | None
) -> Callable[[Sequence[int]], None]:
    """To be called with examples that are done: reports the tokens done so far of all that are to be done."""
    total = sum(len(examples[index].token_ids) - 1 for index in indices)
    done = 0

    def advance(some: Sequence[int]) -> None:
        nonlocal done
        done += sum(len(examples[index].token_ids) - 1 for index in some)
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
    """Score a shard unless it is whole; of segments, how likely their author stops behind each that was scored."""
    indices = store.shards[shard]
    if _is_whole(store, shard):
        advance(indices)
        return None
    found, stops = _score_shard(model, examples, indices, max_batch_tokens, advance, store.header.hidden_states)
    store.write(shard, *found)
    return stops


def read_scores(model: Scored, examples: Sequence[Example], *, hidden_states: bool = False) -> list[Tensor]:
    """What `write_scores` would write, left in memory.

    Returns:
        Of all target tokens, example by example: log-probabilities in nats, shape (M,), whether each is the model's
        argmax, shape (M,), and if wanted its last hidden states, shape (M, H).

    Raises:
        ConfigError, MismatchError, ModelFailure, ToolFailure: as `write_scores`.
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
    """Log-probabilities and flags of these examples' target tokens, and hidden states if wanted, in their order; of
    segments also how likely their author stops behind each."""
    results: dict[int, tuple[Tensor, ...]] = {}
    for chosen in _batches(model, examples, indices, max_batch_tokens):
        results.update(zip(chosen, _score_batch(model, examples, chosen, hidden_states), strict=True))
        advance(chosen)
    found = [torch.cat(values) for values in zip(*(results[index] for index in indices), strict=True)]
    return found, found.pop(2) if examples[indices[0]].segments is not None else None


def _check_stops(name: str, stops: Sequence[Tensor]) -> None:
    """Warn about an assistant that writes on where segments end: asked for one, it would write others behind it."""
    logprobs = torch.cat([torch.zeros(0), *stops])
    if len(logprobs) and logprobs.mean() < LOW_STOP:
        logger.warning(
            "%s gives the end of a segment a log-probability of %.1f nats on average, expected more than %.0f: "
            "where it is asked it will often write on past the end; train it on such texts or take another assistant",
            name,
            logprobs.mean(),
            LOW_STOP,
        )


def find_scores(
    directory: Path, examples: Sequence[Example], spec: AssistantSpec | None = None, *, hidden_states: bool = False
) -> Scores | None:
    """The scores in a directory if they are complete; None if there is something left to score.

    Args:
        spec: compared with where the scored model came from, if given.
        hidden_states: they must hold hidden states too.

    Raises:
        ConfigError: they are of other examples or another model, or without hidden states; what differs is named.
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
    whole = all(_is_whole(store, shard) for shard in range(len(store.shards)))
    return store.collect() if whole else None


def load_scores(directory: Path, examples: Sequence[Example], spec: AssistantSpec | None = None) -> Scores:
    """The complete scores in a directory, checked against the examples.

    Raises:
        ConfigError: as `find_scores`.
        ArtefactError: there are none, or they are incomplete or damaged.
    """
    if read_header(directory) is None:
        raise ArtefactError(f"there are no scores in {directory}: no {HEADER}; run 'collm score' first")
    scores = find_scores(directory, examples, spec)
    if scores is None:
        raise ArtefactError(
            f"the scores in {directory} are incomplete or damaged; run the same 'collm score' again with the same "
            "--out: it computes what is missing"
        )
    return scores


def _store(directory: Path, header: Header, examples: Sequence[Example]) -> ScoreStore:
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].token_ids), index))
    return ScoreStore(directory, header, order, [example.num_targets for example in examples])


def _is_whole(store: ScoreStore, shard: int) -> bool:
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
                f"example {index} has {length} tokens to read, {model.name} reads at most {model.max_length}; "
                "lower max_length"
            )
        if largest >= model.vocab_size:
            raise MismatchError(
                f"example {index} holds token id {largest}, {model.name} has ids below {model.vocab_size}; "
                "the examples were made with another tokenizer"
            )


def _batches(
    model: Scored, examples: Sequence[Example], indices: Sequence[int], max_batch_tokens: int | None
) -> list[list[int]]:
    """A server makes its own batches of what is in flight; a tool reads example by example."""
    if not isinstance(model, LanguageModel):
        return [list(indices)]
    max_batch_tokens = max_batch_tokens or batch_tokens_on(model.device)
    batches = batches_by_length([len(examples[index].token_ids) for index in indices], max_batch_tokens)
    return [[indices[place] for place in batch] for batch in batches]


def _score_batch(
    model: Scored, examples: Sequence[Example], indices: Sequence[int], hidden_states: bool = False
) -> list[tuple[Tensor, ...]]:
    """Log-probabilities and flags of each example's target tokens, and hidden states if wanted, on the CPU."""
    if isinstance(model, RemoteModel):
        return [*model.score([examples[index] for index in indices], numbers=indices)]
    if isinstance(model, ToolModel):
        return [_score_tool(model, examples[index]) for index in indices]
    shifted = [shift(examples[index]) for index in indices]
    counts = [int(one.mask.sum()) for one in shifted]
    segments = examples[indices[0]].segments
    read = _read_batch(model, shifted, hidden_states, None if segments is None else segments.law)
    by_example = list(zip(*(torch.split(values, counts) for values in read), strict=True))
    for index, (values, *_) in zip(indices, by_example, strict=True):
        if values.isnan().any():
            raise ModelFailure(
                f"{model.name} returned NaN logits for example {index} (at its target token "
                f"{int(values.isnan().nonzero()[0])}); check its weights and its dtype"
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
    silent = logits.amax(-1) == logits.amin(-1)
    terms = terms._replace(  # a tool with nothing more to say has ended its segment
        correct=terms.correct & ~silent, stops=terms.stops | silent, log_start=terms.log_start.masked_fill(silent, 0.0)
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
                of_read = batch.gold[at], batch.rows[at], batch.scored[at]
                read = read_segments(model, states[at.to(states.device)], *of_read, law)
            return [values.cpu() for values in (*read, *([hidden] if hidden_states else []))]
    finally:
        model.module.train(training)
