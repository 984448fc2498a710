"""One pass for the rows of several adapters of one model. Each has its own KV cache, and the weights are read once."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from collm.engine.packed_pass import Mask, PackedPass, run_model
from collm.engine.reader import Ahead, Reader
from collm.engine.runner import ModelRunner
from collm.engine.sequence import Sequence
from collm.errors import CollmError
from collm.models.assistant import Assistant, ModelOutput
from collm.models.language_model import LanguageModel
from collm.models.loading import with_shared_weights

_LOG = logging.getLogger(__name__)


class _SharedLayout:
    """The layouts of several runners' passes, one after the other in one row of T tokens."""

    def __init__(self, parts: Mapping[ModelRunner, PackedPass]) -> None:
        self.parts = list(parts.values())
        self.sizes = [len(part.token_ids) for part in self.parts]
        ids, positions = zip(*((part.token_ids, part.positions) for part in self.parts), strict=True)
        self.token_ids, self.positions = torch.cat(ids), torch.cat(positions)
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        self.rows = {one: slice(end - n, end) for one, end, n in zip(parts, ends, self.sizes, strict=True)}
        self.factors: dict[Any, Tensor] = {}

    def attend(self, module: Any, query: Tensor, memory: Any, mask: Mask, scale: float, **caps: Any) -> Tensor:
        """Attention of queries (H, T, D), each over the cache of its runner: (T, H, D_v)."""
        parts = zip(self.parts, torch.split(query, self.sizes, 1), *memory, strict=True)
        return torch.cat(
            [part.attend(module, own, (keys, values), mask, scale, **caps) for part, own, keys, values in parts]
        )

    def factor(self, low: _Low) -> Tensor:
        """The scale of each runner's columns at its own rows, 0 at others, shape (T, sum of ranks)."""
        if low.owners not in self.factors:
            factor, column = low.down.new_zeros(len(self.token_ids), len(low.down)), 0
            for runner, rank, scale in low.owners:
                factor[self.rows.get(runner, slice(0)), column : column + rank] = scale
                column += rank
            self.factors[low.owners] = factor
        return self.factors[low.owners]


class _SharedCache(Cache):  # type: ignore[misc]
    """The KV caches of a pass's runners."""

    layout: _SharedLayout

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store keys and values, shape (1, H, T, D), and return the layer's memory of each runner."""
        memories = []
        states = (torch.split(one, self.layout.sizes, 2) for one in (keys, values))
        for part, *own in zip(self.layout.parts, *states, strict=True):
            part.cache.layout = part
            memories.append(part.cache.update(*own, layer_idx))
        all_keys, all_values = zip(*memories, strict=True)
        return all_keys, all_values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(part.num_cached for part in self.layout.parts)


class _Low(NamedTuple):
    """The low-rank matrices of one layer: those of all runners that adapt it, one after the other.

    Attributes:
        down, up: shape (sum of ranks, inputs) and (sum of ranks, outputs).
        owners: the runner, the rank and the scale of each.
    """

    down: Tensor
    up: Tensor
    owners: tuple[tuple[ModelRunner, int, float], ...]

    @classmethod
    def of(cls, layers: ListOf[tuple[ModelRunner, Any]]) -> _Low:
        """Join the matrices of a layer. The adapters keep views of them, so that they are in memory once."""
        downs, ups = ([getattr(layer, name)["default"].weight for _, layer in layers] for name in ("lora_A", "lora_B"))
        down, up = torch.cat([one.data for one in downs]), torch.cat([one.data.T for one in ups])
        ranks = [len(one) for one in downs]
        for joined, olds in ((down, downs), (up, ups)):
            for old, new in zip(olds, torch.split(joined, ranks), strict=True):
                old.data = new if olds is downs else new.T
        scales = [float(layer.scaling["default"]) for _, layer in layers]
        return cls(down, up, tuple(zip((runner for runner, _ in layers), ranks, scales, strict=True)))


class SharedPass:
    """Runs several runners whose models differ in their LoRA adapters only, unless its model has once failed.

    All rows pass through the layers of the model itself. Where adapters change a layer, the low-rank products of all
    adapters are two matrix products. Between them, a row keeps only what is its own adapter's.
    """

    def __init__(self, runners: ListOf[ModelRunner]) -> None:
        self.runners, self.is_usable = runners, True
        first = runners[0].model
        module: Any = with_shared_weights(first.module)
        plain = module.unload() if hasattr(module, "peft_config") else module
        self._model = LanguageModel(plain, name=first.name, vocab_size=first.vocab_size)
        self._cache, layers = _SharedCache(), dict[str, list[tuple[ModelRunner, Any]]]()
        for runner in runners:
            for name, layer in _adapted(runner.model):
                layers.setdefault(name, []).append((runner, layer))
        for name, owners in layers.items():
            plain.get_submodule(name).register_forward_hook(self._hook(_Low.of(owners)))

    @torch.inference_mode()
    def extend(self, unread: Mapping[ModelRunner, tuple[dict[int, list[int]], dict[int, int]]]) -> list[ModelOutput]:
        """What `ModelRunner.extend` returns of each runner. All slots are as before if the model raises."""
        layout = _SharedLayout({one: one.layout(*arguments) for one, arguments in unread.items()})
        hidden = run_model(self._model, cast(Any, self._cache), layout)
        outputs = []
        for (runner, (unseen, _)), part in zip(unread.items(), layout.parts, strict=True):
            states = hidden[layout.rows[runner]]
            states = states if part.kept is None else states[part.kept]
            outputs.append(ModelOutput(self._model.logits(states), states))
            runner.note(unseen)
        return outputs

    def _hook(self, low: _Low) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            between = nn.functional.linear(args[0].to(low.down.dtype), low.down)  # (1, T, sum of ranks)
            return (output + (between * self._cache.layout.factor(low)) @ low.up).to(output.dtype)

        return add


def groups_of(readers: ListOf[Reader], passes: ListOf[SharedPass]) -> list[tuple[list[Reader], SharedPass | None]]:
    """The readers that share one of the passes, and each other one alone."""
    groups: dict[int, tuple[list[Reader], SharedPass | None]] = {}
    for reader in readers:
        shared = next((one for one in passes if reader.runner in one.runners), None)
        groups.setdefault(id(shared or reader), ([], shared))[0].append(reader)
    return list(groups.values())


def shared_passes(authors: ListOf[Assistant]) -> list[SharedPass]:
    """A pass for each model that several authors are adapters of."""
    families: dict[frozenset[int], list[ModelRunner]] = {}
    for author in authors:
        if isinstance(author, ModelRunner) and not author.is_static and (weights := _weights(author.model)):
            families.setdefault(weights, []).append(author)
    return [SharedPass(runners) for runners in families.values() if len(runners) > 1]


def _adapted(model: LanguageModel) -> list[tuple[str, Any]]:
    """The layers of a model that an adapter changes, by name."""
    return [(name, module) for name, module in model.inner.named_modules() if hasattr(module, "lora_A")]


def _weights(model: LanguageModel) -> frozenset[int] | None:
    """What identifies the weights of a model without its adapter; None if that is more than plain low-rank matrices."""
    low = set[int]()
    for _, layer in _adapted(model):
        if list(layer.lora_A) != ["default"] or layer.lora_variant or layer.fan_in_fan_out or layer.merged:
            return None
        low |= {id(one) for name in ("lora_A", "lora_B") for one in getattr(layer, name).parameters()}
        if layer.lora_B["default"].bias is not None or not isinstance(layer.get_base_layer(), nn.Linear):
            return None
    return frozenset(id(one) for one in model.inner.parameters()) - low


def read_ahead(shared: SharedPass, wanted: Mapping[Reader, Mapping[Sequence, range]]) -> dict[Reader, Ahead]:
    """Read the unread tokens of all readers in one pass. Nothing is read if each had better read alone."""
    due = {reader: places for reader, places in wanted.items() if places}
    if len(due) < 2 or not shared.is_usable or any(reader.would_copy(places) for reader, places in due.items()):
        return {}
    start = time.perf_counter()
    try:
        unread = {reader: reader.unread(list(places), places) for reader, places in due.items()}
        size = sum(len(token_ids) for unseen, _ in unread.values() for token_ids in unseen.values())
        if size > shared.runners[0].max_pass_tokens:
            return {}
        outputs = shared.extend({cast(ModelRunner, one.runner): arguments for one, arguments in unread.items()})
    except Exception as error:
        shared.is_usable = isinstance(error, CollmError)
        _LOG.warning("%d adapters failed in one pass (%r); retrying them one by one", len(due), error)
        return {}
    seconds = (time.perf_counter() - start) / len(due)
    return {one: Ahead(list(due[one]), output, seconds) for one, output in zip(unread, outputs, strict=True)}
