"""Decoding speed as ratios of one run: against the limit, each model alone, and a cache-free loop. Prints JSON.

Models have real shapes and random weights; who writes is drawn at a given deferral rate, independently for each
token. `limit` is N * t_base + sum over deferrals of t_assistant(suffix), with t measured on the bare models with
transformers' own cache, in the same run and at the same lengths.

    python benchmarks/decode.py --base 25m --assistant 150m --dtype float32 --prompt 32 --new 64 --rate 0.1 0.3
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams
from collm.artefact import library_versions
from collm.core.policies import RandomPolicy, SingleAuthorPolicy

SHAPES = {  # hidden, intermediate, layers, heads, key heads, vocabulary
    "25m": (384, 1024, 8, 6, 2, 16_384),
    "150m": (768, 2048, 16, 12, 4, 32_000),
    "1b": (2048, 8192, 16, 32, 8, 128_256),
    "7b": (4096, 11_008, 32, 32, 32, 32_000),
    "8b": (4096, 14_336, 32, 32, 8, 128_256),
    "34b": (8192, 22_016, 48, 64, 8, 32_000),
}
SUFFIXES = (1, 2, 4, 8, 16, 32)


def make_model(shape: str, vocab_size: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    hidden, intermediate, layers, heads, key_heads, _ = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocab_size,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a call, the device's queue drained before and after."""
    times = []
    for _ in range(repeats + 1):
        _drain()
        start = time.perf_counter()
        run()
        _drain()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def step_seconds(model: PreTrainedModel, length: int, suffix: int) -> float:
    """One forward pass of `suffix` tokens after `length` cached ones, with transformers' own cache."""
    device = model.device
    cache = DynamicCache()
    if length:
        model(torch.full((1, length), 5, device=device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    ids = torch.full((1, suffix), 7, device=device)

    def run() -> None:
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-suffix)

    return seconds(run, repeats=5)


class StepTimes:
    """t(suffix, length) of one model, interpolated between measured points."""

    def __init__(self, model: PreTrainedModel, prompt: int, new: int) -> None:
        self.prompt, self.new = prompt, new
        self.prefills = [step_seconds(model, 0, length) for length in (prompt, prompt + new)]
        self.table = {m: [step_seconds(model, at, m) for at in (prompt, prompt + new)] for m in SUFFIXES}

    def at(self, suffix: int, length: int) -> float:
        """Seconds to read `suffix` tokens after `length` cached ones; from 0 they are a prefill."""
        if length == 0:
            return self._between(*self.prefills, suffix)
        points = [(m, self._between(early, late, length)) for m, (early, late) in self.table.items()]
        for (m0, t0), (m1, t1) in pairwise(points):
            if suffix <= m1:
                return t0 + (t1 - t0) * (suffix - m0) / (m1 - m0)
        return points[-1][1] * suffix / points[-1][0]

    def _between(self, early: float, late: float, length: int) -> float:
        return early + (late - early) * (length - self.prompt) / self.new


def limit_seconds(authors: list[int], base: StepTimes, assistant: StepTimes) -> float:
    """N * t_base + sum over deferrals of t_assistant(suffix); each model's first read is a prefill."""
    prompt = base.prompt
    total = base.at(prompt, 0) + sum(base.at(1, prompt + i) for i in range(len(authors) - 1))
    seen = 0
    for i, author in enumerate(authors):
        if author:
            total += assistant.at(prompt + i - seen, seen)
            seen = prompt + i
    return total


def cache_free_seconds(
    base: PreTrainedModel, assistant: PreTrainedModel, prompt: list[int], authors: list[int]
) -> float:
    """The same authors, every model reading everything again for every token."""

    @torch.inference_mode()
    def run() -> None:
        ids = list(prompt)
        for author in authors:
            text = torch.tensor([ids], device=base.device)
            logits = base(text, use_cache=False, logits_to_keep=1).logits
            if author:
                logits = assistant(text, use_cache=False, logits_to_keep=1).logits
            ids.append(int(logits[0, -1].argmax()))

    return seconds(run, repeats=1)


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    vocab_size = min(SHAPES[arguments.base][5], SHAPES[arguments.assistant][5])
    dtype = getattr(torch, arguments.dtype)
    base, assistant = (
        make_model(shape, vocab_size, dtype, arguments.device) for shape in (arguments.base, arguments.assistant)
    )
    tokenizer = make_tokenizer(vocab_size)
    pair = CoLLM(base, [assistant], DeferralHead(base.config.hidden_size), tokenizer)
    alone = CoLLM(assistant, [assistant], DeferralHead(assistant.config.hidden_size), tokenizer)
    params = SamplingParams(max_new_tokens=arguments.new)
    results: list[dict[str, object]] = []
    base_times, assistant_times = (StepTimes(m, arguments.prompt, arguments.new) for m in (base, assistant))
    for batch in arguments.batch:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(10, vocab_size, (batch, arguments.prompt), generator=generator).tolist()
        singles = {
            "base": lambda: pair.generate(prompts, params, policy=SingleAuthorPolicy(0), max_batch=batch),  # noqa: B023
            "assistant": lambda: alone.generate(prompts, params, policy=SingleAuthorPolicy(0), max_batch=batch),  # noqa: B023
        }
        ours = {name: seconds(run, arguments.repeats) for name, run in singles.items()}
        theirs = {
            name: seconds(lambda: _transformers_generate(model, prompts, arguments.new), arguments.repeats)  # noqa: B023
            for name, model in (("base", base), ("assistant", assistant))
        }
        for rate in arguments.rate:
            seeded = SamplingParams(max_new_tokens=arguments.new, seed=1)
            run = lambda: pair.generate(prompts, seeded, policy=RandomPolicy(rate), max_batch=batch)  # noqa: B023, E731
            out, took = run(), seconds(run, arguments.repeats)
            row: dict[str, object] = {
                "batch": batch,
                "rate": round(out.deferral_rate, 3),
                "tokens_per_s": round(batch * arguments.new / took, 1),
                "speed_vs_assistant_alone_ours": round(ours["assistant"] / took, 3),
                "speed_vs_assistant_alone_transformers": round(theirs["assistant"] / took, 3),
                "base_alone_ours_vs_transformers": round(theirs["base"] / ours["base"], 3),
                "assistant_alone_ours_vs_transformers": round(theirs["assistant"] / ours["assistant"], 3),
            }
            if batch == 1:
                row["time_over_limit"] = round(took / limit_seconds(out[0].authors, base_times, assistant_times), 3)
                if arguments.cache_free:
                    slow = cache_free_seconds(base, assistant, prompts[0], out[0].authors)
                    row["speed_vs_cache_free"] = round(slow / took, 2)
            results.append(row)
    return results


def _transformers_generate(model: PreTrainedModel, prompts: list[list[int]], new: int) -> None:
    ids = torch.tensor(prompts, device=model.device)
    options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=SHAPES, default="25m")
    parser.add_argument("--assistant", choices=SHAPES, default="150m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rate", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache-free", action="store_true", help="also measure a loop without any cache")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results = measure(arguments)
    print(json.dumps({"arguments": vars(arguments), "versions": library_versions(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
