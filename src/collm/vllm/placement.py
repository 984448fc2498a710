"""Placement of servers on one machine: their GPUs or threads, and the memory of their KV caches."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from collm import artefact
from collm.artefact.manifest import read_manifest
from collm.core.types import author_name
from collm.errors import ConfigError, LoadError
from collm.models.language_model import context_length
from collm.models.loading import ModelSpec, empty_model
from collm.models.names import names_gguf
from collm.vllm import PROPOSER, SETTINGS
from collm.vllm.launch import ServerProcess, check_python, launched
from collm.vllm.servers import Servers

USABLE = 0.9
"""Share of a device's memory that servers may use."""
OVERHEAD_BYTES = 2 << 30
"""Memory of a server for activations, CUDA graphs and libraries; on a CPU, for the interpreter."""
DRAFTS = 12
"""Default limit of tokens that the base of one engine writes before the assistant reads them."""
LENGTH = 8192
"""Default limit of the longest sequence, in tokens."""
BLOCK_TOKENS = 32
"""Tokens that a sequence may leave unused in its last cache block. vLLM's CPU builds require multiples of 32."""


@dataclass(frozen=True)
class ModelMemory:
    """Memory that a model needs, in bytes.

    Attributes:
        kv_per_token: size of a token's keys and values in all layers; an upper bound if layers share or compress them.
        max_length: longest sequence that the model was made for, in tokens; None if its config states none.
        dtype: dtype in which the model is saved or is to be loaded. vLLM's own default is half precision for
            float32 models.
    """

    weights: int
    kv_per_token: int
    max_length: int | None
    dtype: str

    @classmethod
    def of(cls, spec: ModelSpec) -> ModelMemory:
        """Compute the memory from a model's config. Raises a ConfigError if the model is to be quantized or is a GGUF
        file, and a LoadError if there is no config of a causal LM with attention.
        """
        if spec.quantization is not None or names_gguf(spec.path) or spec.adapter is not None:
            kind = f"to be quantized ({spec.quantization})" if spec.quantization else "a GGUF file"
            kind = kind if spec.adapter is None else f"to be read with the adapter {spec.adapter}"
            raise ConfigError(
                f"{spec.path} is {kind}, which launched servers do not support; use the original checkpoint, or start "
                "a server of it yourself and give its address with --servers"
            )
        model = empty_model(spec)
        config: Any = model.config
        text = config.get_text_config()
        if not getattr(text, "num_attention_heads", None):
            raise LoadError(
                f"{spec.path!r} is a {type(model).__name__} without attention heads; expected a Transformer"
            )
        dtype = (config.dtype or torch.float32) if spec.dtype == "auto" else getattr(torch, spec.dtype)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            weights=sum(weight.numel() for weight in model.parameters()) * dtype.itemsize,
            kv_per_token=2 * text.num_hidden_layers * heads * width * dtype.itemsize,
            max_length=context_length(text),
            dtype=str(dtype).removeprefix("torch."),
        )


@dataclass(frozen=True)
class Machine:
    """The resources of a machine, or those of one server.

    Attributes:
        gpu_bytes: memory of each GPU, from the number `first_gpu` on.
        memory_bytes: free main memory, which servers without GPUs share; of a server with GPUs, their memory.
        cores: number of cores, and so of threads, of a server without GPUs.
    """

    gpu_bytes: Sequence[int]
    memory_bytes: int
    cores: int
    first_gpu: int = 0

    @classmethod
    def this(cls) -> Machine:
        """The machine that runs this process."""
        gpus = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
        return cls(gpus, psutil.virtual_memory().available, len(os.sched_getaffinity(0)))

    def divided(self, count: int) -> list[Machine]:
        """Divide the machine between servers. Servers with equal parts share this part.

        The base gets the first GPU. The assistants get equal shares of the others, in powers of two for tensor
        parallelism. If there are fewer GPUs than servers, all share the first. A single server gets all GPUs, up to a
        power of two. Without GPUs, servers get equal shares of the cores.
        """
        num_gpus = len(self.gpu_bytes)
        if not num_gpus:
            return [replace(self, cores=max(1, self.cores // count))] * count
        share = num_gpus if count == 1 else (num_gpus - 1) // (count - 1)
        size = 1 << max(share.bit_length() - 1, 0)
        groups = [(0, size)] if count == 1 else [(0, 1), *((1 + k * size, size) for k in range(count - 1))]
        parts = []
        for first, n in groups if num_gpus >= count else [(0, 1)] * count:
            own = self.gpu_bytes[first : first + n]
            parts.append(Machine(own, sum(own), self.cores, first))
        return parts

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that limit a server to these resources.

        More threads than cores would slow each other down. On a CPU, vLLM would run the model in a separate process.
        Both processes would then spin while they wait for each other, so on few cores little time would be left for
        other work.
        """
        if self.gpu_bytes:
            gpus = range(self.first_gpu, self.first_gpu + len(self.gpu_bytes))
            return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        return {"OMP_NUM_THREADS": str(self.cores), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

    def kv_tokens(self, name: str, models: Sequence[ModelMemory], max_batch: int, length: int) -> int:
        """Number of tokens whose keys and values fit for all models that share this memory, as many as are wanted.

        T = (memory - sum_i (weights_i + overhead)) / sum_i kv_i, because base and assistants read the same sequences.
        Raises a ConfigError, which names the server, if not even one sequence of this length fits.
        """
        left = USABLE * self.memory_bytes - sum(model.weights + OVERHEAD_BYTES for model in models)
        tokens = min(max_batch * (length + BLOCK_TOKENS), int(left // sum(model.kv_per_token for model in models)))
        if tokens < length + BLOCK_TOKENS:
            raise ConfigError(
                f"beside its weights, the {name} has memory for the keys and values of {max(tokens, 0)} tokens, "
                f"expected at least {length}, the longest sequence; lower --max-model-len, or use more memory or "
                "several machines"
            )
        return tokens

    def flags(self, size: ModelMemory, tokens: int) -> list[str]:
        """vLLM's flags for a model on these resources, with a KV cache of this many tokens."""
        num_gpus = len(self.gpu_bytes)
        flags = ["--kv-cache-memory-bytes", str(-(-tokens * size.kv_per_token // max(1, num_gpus)))]
        if not num_gpus:
            flags += ["--enforce-eager", "--block-size", str(BLOCK_TOKENS)]
            return [*flags, "--distributed-executor-backend", "uni"]
        taken = size.weights + tokens * size.kv_per_token + OVERHEAD_BYTES * num_gpus
        share = f"{min(USABLE, taken / self.memory_bytes):.3f}"
        return [*flags, "--tensor-parallel-size", str(num_gpus), "--gpu-memory-utilization", share]


def fits_in_one(collaboration: str) -> bool:
    """Whether the collaboration has exactly one assistant, which is a language model."""
    manifest = read_manifest(artefact.local_directory(collaboration, None))
    return len(manifest.assistants) == 1 and isinstance(manifest.assistants[0], ModelSpec)


def placed(
    models: Mapping[str, ModelSpec],
    machine: Machine,
    *,
    max_batch: int,
    max_length: int | None = None,
    flags: Mapping[str, Sequence[str]] | None = None,
) -> list[ServerProcess]:
    """Prepare servers on one machine for `max_batch` sequences, or for as many tokens as fit.

    Args:
        models: the models by the names of their authors, the base first.
        max_length: longest sequence, in tokens. By default, what all models can read, at most 8192.
        flags: further flags of vLLM by author, which come last.

    Raises:
        ConfigError: not even one sequence of this length fits.
        LoadError: as in `ModelMemory.of`.
    """
    sizes = [ModelMemory.of(spec) for spec in models.values()]
    parts = machine.divided(len(models))
    length = _length(sizes, max_length)
    servers = []
    for (name, spec), size, part in zip(models.items(), sizes, parts, strict=True):
        sharing = [other for other, its in zip(sizes, parts, strict=True) if its == part]
        own = _flags(spec, size, max_batch, length) + part.flags(size, part.kv_tokens(name, sharing, max_batch, length))
        servers.append(ServerProcess(name, spec.path, [*own, *(flags or {}).get(name, ())], part.environment))
    return servers


def placed_in_one(
    collaboration: str,
    machine: Machine,
    *,
    max_batch: int,
    max_length: int | None = None,
    drafts: int = DRAFTS,
    flags: Sequence[str] = (),
) -> ServerProcess:
    """Prepare one server that holds base and assistant (`inline`) and uses all GPUs, or all threads, of a machine.

    Both models keep what they have read, so both caches hold the same number of tokens. The base is on the first GPU.

    Args:
        collaboration: a directory or Hub name.
        machine, max_batch, max_length: as in `placed`.
        drafts: largest number of tokens that the base writes before the assistant reads them.
        flags: further flags of vLLM, which come last.

    Raises:
        ArtefactError: there is no collaboration.
        ConfigError, LoadError: it does not fit in one engine, or as in `placed`.
    """
    if not fits_in_one(collaboration):
        raise ConfigError(
            f"one engine holds a base and one language model as its assistant, but {collaboration} has other "
            "assistants; use a server for each model ('collm launch'), or engine 'local'"
        )
    directory = artefact.local_directory(collaboration, None)
    manifest = read_manifest(directory)
    name, assistant = author_name(1), cast(ModelSpec, manifest.assistants[0])
    sizes = [ModelMemory.of(manifest.base_weights(directory)), ModelMemory.of(assistant)]
    (part,) = machine.divided(1)
    length = _length(sizes, max_length)
    tokens = part.kv_tokens(name, sizes, max_batch, length)
    settings = {"collaboration": str(directory), "cache_memory": tokens * sizes[0].kv_per_token}
    proposer = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": drafts}
    flags = [
        *_flags(assistant, sizes[1], max_batch, length),
        *part.flags(sizes[1], tokens),
        *("--speculative-config", json.dumps(proposer)),
        *("--additional-config", json.dumps({SETTINGS: settings})),
        *flags,
    ]
    return ServerProcess(name, assistant.path, flags, {**part.environment, "VLLM_USE_V2_MODEL_RUNNER": "0"})


def _length(sizes: Sequence[ModelMemory], max_length: int | None) -> int:
    return max_length or min(LENGTH, *(size.max_length or LENGTH for size in sizes))


def _flags(spec: ModelSpec, size: ModelMemory, max_batch: int, length: int) -> list[str]:
    """vLLM's flags for one model on any resources."""
    flags = ["--dtype", size.dtype, "--max-model-len", str(length), "--max-num-seqs", str(max_batch)]
    flags += ["--generation-config", "vllm"]  # the model's would change sampling and limit the length
    return flags if spec.revision is None else [*flags, "--revision", spec.revision]


@contextmanager
def one_engine(
    collaboration: str | Path,
    logs: Path,
    *,
    python: str = sys.executable,
    max_batch: int = 16,
    max_length: int | None = None,
    wait_s: float = 900.0,
    flags: Sequence[str] = (),
) -> Iterator[Servers]:
    """Run one vLLM engine with a collaboration on this machine while the block runs.

        with one_engine("my-run/collaboration", Path("logs")) as servers:
            model = CoLLM.from_pretrained("my-run/collaboration", servers=servers)

    Args:
        logs: directory for vLLM's output.
        python: the interpreter that has vLLM and collm.
        collaboration, max_batch, max_length, flags: as in `placed_in_one`.
        wait_s: longest time until the engine is up.

    Raises:
        ArtefactError, ConfigError, LoadError: as in `placed_in_one`, `check_python` and `launched`.
    """
    server = placed_in_one(str(collaboration), Machine.this(), max_batch=max_batch, max_length=max_length, flags=flags)
    with launched([server], check_python(python, one_engine=True), logs, wait_s=wait_s):
        yield Servers([server.url])
