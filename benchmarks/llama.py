"""Decoding in llama.cpp: collm beside bare loops over the same files. A part of `benchmarks.decode`.

The pair is SmolLM2-135M with its first 10 layers as the base, and whole as the assistant. The author of each token is
fixed beforehand, so what the models write does not matter. The bare loops make the same calls of llama.cpp and nothing
else. The loop with a draft model drafts with the base and verifies with the assistant; which drafts are accepted is
fixed as well.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.pairs import PatternPolicy, pattern
from collm import CoLLM, DeferralHead, SamplingParams
from collm.core.policies import SingleAuthorPolicy
from collm.demo.real import smollm2
from collm.models.gguf_export import write_gguf
from collm.models.llama import CACHE_TYPES
from collm.models.loading import ModelSpec, load_model, load_tokenizer

LAYERS = 10
DRAFTS = 4  # tokens of a draft
AGREEMENTS = (0.5, 0.8)
RUNS = (1, 4)
ROUNDS = 3


class Bare:
    """A context of llama.cpp, without anything else."""

    def __init__(self, model: Any, sequences: int, positions: int, cache_type: int) -> None:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.kv_unified = positions * sequences, sequences, True
        settings.n_batch = settings.n_ubatch = 512
        settings.type_k = settings.type_v = cache_type
        if cache_type == CACHE_TYPES["float32"]:  # as in collm, where float32 is exact
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(model, settings)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.length = [0] * sequences

    def read(self, unread: dict[int, Sequence[int]], keep: int = 1) -> dict[int, int]:
        """Read tokens of each sequence, with the logits of its last `keep`. Returns its most probable next token."""
        batch, n, last = self.batch, 0, []
        for sequence, token_ids in unread.items():
            for i, token_id in enumerate(token_ids):
                if n == 512:
                    batch.n_tokens = n
                    assert llama_cpp.llama_decode(self.context, batch) == 0
                    n = 0
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = token_id, self.length[sequence], 1
                batch.seq_id[n][0], batch.logits[n] = sequence, i >= len(token_ids) - keep
                self.length[sequence] += 1
                n += 1
            last.append(n - 1)
        batch.n_tokens = n
        assert llama_cpp.llama_decode(self.context, batch) == 0
        return {sequence: self._argmax(row) for sequence, row in zip(unread, last, strict=True)}

    def _argmax(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def cut(self, sequence: int, length: int) -> None:
        llama_cpp.llama_memory_seq_rm(self.memory, sequence, length, -1)
        self.length[sequence] = length

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)


class LlamaBench:
    """One pair of files in one type, and the loops over it."""

    def __init__(self, arguments: Any, kind: str, files: Sequence[Path]) -> None:
        self.arguments, self.kind, self.new = arguments, kind, arguments.new
        self.cache_type = CACHE_TYPES["float32" if kind == "f32" else "float16"]
        self.weights = [
            llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
            for file in files
        ]
        specs = [ModelSpec(str(file)) for file in files]
        tokenizer = load_tokenizer(specs[1])
        self.pair = CoLLM(specs[0], specs[1:], DeferralHead(576), tokenizer)
        self.alone = CoLLM(specs[1], specs[1:], DeferralHead(576), tokenizer)
        loaded = [load_model(spec.dequantized()) for spec in specs]
        self.in_transformers = CoLLM(loaded[0], loaded[1:], DeferralHead(576), tokenizer)

    def rows(self) -> Iterator[dict[str, Any]]:
        for length in self.arguments.prompt:
            for batch in self.arguments.batch:
                generator = torch.Generator().manual_seed(0)
                prompts = torch.randint(1000, 40_000, (batch, length), generator=generator).tolist()
                yield from self._cells(prompts)

    def _cells(self, prompts: list[list[int]]) -> Iterator[dict[str, Any]]:
        nothing = [PatternPolicy((False,) * self.new)] * len(prompts)
        alone = {
            "bare": lambda: self._bare_pair(self.weights[1:], prompts, nothing),
            "collm": lambda: self._collm(self.alone, prompts, SingleAuthorPolicy(0)),
        }
        for agreement in AGREEMENTS:
            alone[f"drafting_{agreement}"] = lambda share=agreement: self._bare_drafting(prompts, share)
        taken = _milliseconds(alone)
        same = {"type": self.kind, "prompt": len(prompts[0]), "batch": len(prompts)}
        yield {
            **same,
            "alone_bare_ms": taken["bare"],
            "alone_vs_bare": taken["bare"] / taken["collm"],
            **{f"drafting_{one}_vs_alone": taken["bare"] / taken[f"drafting_{one}"] for one in AGREEMENTS},
        }
        for rate in self.arguments.rate:
            for run in RUNS if len(prompts) == 1 else RUNS[:1]:
                policies = [pattern(rate, run, self.new, seed) for seed in range(len(prompts))]
                ways: dict[str, Callable[[], float]] = {
                    "bare": lambda: self._bare_pair(self.weights, prompts, policies),  # noqa: B023
                    "collm": lambda: self._collm(self.pair, prompts, policies, lookahead=0),  # noqa: B023
                    "drafts": lambda: self._collm(self.pair, prompts, policies),  # noqa: B023
                }
                of_pair = _milliseconds(ways)
                torches = 1e3 * self._collm(self.in_transformers, prompts, policies, lookahead=0)
                yield {
                    **same,
                    "aimed_rate": rate,
                    "run": run,
                    "pair_ms": of_pair["collm"],
                    "pair_vs_bare": of_pair["bare"] / of_pair["collm"],
                    "bare_vs_alone": taken["bare"] / of_pair["bare"],
                    "pair_vs_alone": taken["bare"] / of_pair["collm"],
                    "lookahead_speedup": of_pair["collm"] / of_pair["drafts"],
                    "pair_vs_transformers": torches / of_pair["collm"],
                }

    # Each way returns seconds per token of a sequence.

    def _collm(self, model: CoLLM, prompts: list[list[int]], policy: Any, lookahead: int | None = None) -> float:
        params = SamplingParams(max_tokens=self.new, ignore_eos=True)
        engine = {"max_batch": len(prompts), "lookahead": lookahead}
        for runner in model.runners:
            runner.forget()  # type: ignore[union-attr]  # otherwise it would not read the prompts again
        start = time.perf_counter()
        model.generate(prompts, params, policy=policy, **engine)  # type: ignore[arg-type]
        return (time.perf_counter() - start) / self.new

    def _bare_pair(self, weights: Sequence[Any], prompts: list[list[int]], policies: Sequence[PatternPolicy]) -> float:
        """All sequences in lockstep. The assistant reads what it has not read where it writes."""
        length = len(prompts[0]) + self.new
        models = [Bare(one, len(prompts), length, self.cache_type) for one in weights]
        start = time.perf_counter()
        texts = [list(prompt) for prompt in prompts]
        for position in range(self.new):
            written = models[0].read({i: text[models[0].length[i] :] for i, text in enumerate(texts)})
            asked = [i for i, policy in enumerate(policies) if policy.deferred[position]]
            if asked:
                written |= models[1].read({i: texts[i][models[1].length[i] :] for i in asked})
            for i, token_id in written.items():
                texts[i].append(token_id)
        taken = (time.perf_counter() - start) / self.new
        for model in models:
            model.close()
        return taken

    def _bare_drafting(self, prompts: list[list[int]], agreement: float) -> float:
        """Draft-model decoding, in lockstep. Each drafted token is accepted with probability `agreement`."""
        length, rng = len(prompts[0]) + self.new + DRAFTS + 1, random.Random(0)
        draft, target = (Bare(one, len(prompts), length, self.cache_type) for one in self.weights)
        start = time.perf_counter()
        texts = [list(prompt) for prompt in prompts]
        ends = [len(text) + self.new for text in texts]
        while active := [i for i, text in enumerate(texts) if len(text) < ends[i]]:
            drafted: dict[int, list[int]] = {i: [] for i in active}
            for _ in range(DRAFTS):
                found = draft.read({i: (texts[i] + drafted[i])[draft.length[i] :] for i in active})
                for i, token_id in found.items():
                    drafted[i].append(token_id)
            own = target.read({i: (texts[i] + drafted[i])[target.length[i] :] for i in active}, DRAFTS + 1)
            for i in active:
                kept = next((n for n in range(DRAFTS) if rng.random() >= agreement), DRAFTS)
                texts[i] += [*drafted[i][:kept], own[i]]
                for model in (draft, target):
                    model.cut(i, min(model.length[i], len(texts[i]) - 1))
        taken = (time.perf_counter() - start) / self.new
        draft.close()
        target.close()
        return taken


def _milliseconds(ways: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median of each way's times, which alternate."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            times[name].append(1e3 * run())
    return {name: statistics.median(values) for name, values in times.items()}


def llama_rows(arguments: Any) -> Iterator[dict[str, Any]]:
    """All rows, for float32 and Q8_0."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = ModelSpec(str(smollm2(folder / "smollm2")), dtype="float32", device="cpu")
        whole, tokenizer = load_model(spec), load_tokenizer(spec)
        cut = _cut(load_model(spec))
        for kind in ("f32", "q8_0"):
            files = [folder / f"{name}-{kind}.gguf" for name in ("base", "assistant")]
            for file, model in zip(files, (cut, whole), strict=True):
                write_gguf(model, tokenizer, file, kind)
            yield from LlamaBench(arguments, kind, files).rows()


def _cut(model: PreTrainedModel) -> PreTrainedModel:
    """Keep the first layers only."""
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.config.layer_types = None
    return model
