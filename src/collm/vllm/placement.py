"""Placement of servers on one machine: their GPUs or threads, and the memory of their KV caches."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from collm.vllm.launch import ServerPlan, check_python, launched
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
        """Compute the memory from a model's config. Weights are not read.

        Raises:
            ConfigError: the model is to be quantized, or is a GGUF file.
            LoadError: there is no config of a causal LM with attention.
        """
        if spec.quantization is not None or names_gguf(spec.path):
            kind = f"to be quantized ({spec.quantization})" if spec.quantization else "a GGUF file"
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
    """The resources of a machine: the memory of each GPU, the free main memory, and the cores that one may use."""

    gpu_bytes: Sequence[int]
    memory_bytes: int
    cores: int

    @classmethod
    def this(cls) -> Machine:
        """The machine that runs this process."""
        gpus = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
        return cls(gpus, psutil.virtual_memory().available, len(os.sched_getaffinity(0)))

    def devices(self, count: int) -> list[Device]:
        """Divide the machine between servers: its GPUs if it has any, else its threads."""
        if self.gpu_bytes:
            groups = gpus_for(len(self.gpu_bytes), count)
            return [Device(group, 0, sum(self.gpu_bytes[gpu] for gpu in group)) for group in groups]
        return [Device((), max(1, self.cores // count), self.memory_bytes)] * count


@dataclass(frozen=True)
class Device:
    """The resources of one server.

    Attributes:
        gpus: numbers of its GPUs. Servers with equal numbers share these GPUs. Servers without GPUs share the main
            memory.
        threads: number of threads of a server without GPUs.
        memory_bytes: memory of its GPUs together, or free main memory.
    """

    gpus: Sequence[int]
    threads: int
    memory_bytes: int

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that limit a server to this device.

        More threads than cores would slow each other down. On a CPU, vLLM would run the model in a separate process.
        Both processes would then spin while they wait for each other, so on few cores little time would be left for
        other work.
        """
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus))}
        return {"OMP_NUM_THREADS": str(self.threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

    def flags(self, size: ModelMemory, tokens: int) -> list[str]:
        """vLLM's flags for this device, with a KV cache of this many tokens."""
        each = -(-tokens * size.kv_per_token // max(1, len(self.gpus)))
        flags = ["--kv-cache-memory-bytes", str(each)]
        if not self.gpus:
            flags += ["--enforce-eager", "--block-size", str(BLOCK_TOKENS)]
            return [*flags, "--distributed-executor-backend", "uni"]
        taken = size.weights + tokens * size.kv_per_token + OVERHEAD_BYTES * len(self.gpus)
        share = f"{min(USABLE, taken / self.memory_bytes):.3f}"
        return [*flags, "--tensor-parallel-size", str(len(self.gpus)), "--gpu-memory-utilization", share]


def gpus_for(num_gpus: int, num_servers: int) -> list[list[int]]:
    """Choose the GPUs of each server.

    The base gets the first GPU. The assistants get equal shares of the others, in powers of two for tensor parallelism.
    If there are fewer GPUs than servers, all share the first. A single server gets all GPUs, up to a power of two.
    """
    if num_servers == 1:
        return [list(range(1 << (num_gpus.bit_length() - 1)))]
    if num_gpus < num_servers:
        return [[0]] * num_servers
    each = (num_gpus - 1) // (num_servers - 1)
    size = 1 << (each.bit_length() - 1)
    return [[0], *(list(range(1 + k * size, 1 + (k + 1) * size)) for k in range(num_servers - 1))]


def kv_tokens(models: Sequence[ModelMemory], memory_bytes: float, wanted: int) -> int:
    """Number of tokens whose keys and values fit for all servers that share a memory, at most `wanted`.

    T = (memory - sum_i (weights_i + overhead)) / sum_i kv_i, because base and assistants read the same sequences.
    """
    left = memory_bytes - sum(model.weights + OVERHEAD_BYTES for model in models)
    return min(wanted, int(left // sum(model.kv_per_token for model in models)))


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
) -> list[ServerPlan]:
    """Plan servers on one machine for `max_batch` sequences, or for as many tokens as fit.

    Args:
        models: the models by the names of their authors, the base first.
        machine: the machine's resources.
        max_batch: largest number of sequences at once.
        max_length: longest sequence, in tokens. By default, what all models can read, at most 8192.
        flags: further flags of vLLM by author, which come last.

    Raises:
        ConfigError: not even one sequence of this length fits.
        LoadError: as in `ModelMemory.of`.
    """
    sizes = [ModelMemory.of(spec) for spec in models.values()]
    devices = machine.devices(len(models))
    length = _length(sizes, max_length)
    plans = []
    for (name, spec), size, device in zip(models.items(), sizes, devices, strict=True):
        sharing = [other for other, its in zip(sizes, devices, strict=True) if its.gpus == device.gpus]
        tokens = _kv_tokens(sharing, device, name, max_batch, length)
        own = [*_flags(spec, size, device, tokens, max_batch, length), *(flags or {}).get(name, ())]
        plans.append(ServerPlan(name, spec.path, own, device.environment))
    return plans


def placed_in_one(
    collaboration: str,
    machine: Machine,
    *,
    max_batch: int,
    max_length: int | None = None,
    drafts: int = DRAFTS,
    flags: Sequence[str] = (),
) -> ServerPlan:
    """Plan one server that holds base and assistant (`inline`) and uses all GPUs, or all threads, of a machine.

    Both models keep what they have read, so both caches hold the same number of tokens. The base is on the first GPU.

    Args:
        collaboration: a directory or Hub name.
        machine, max_batch, max_length: as in `placed`.
        drafts: largest number of tokens that the base writes before the assistant reads them.
        flags: further flags of vLLM, which come last.

    Raises:
        ArtefactError: there is no collaboration.
        ConfigError: it does not fit in one engine, or as in `placed`.
        LoadError: as in `placed`.
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
    (device,) = machine.devices(1)
    length = _length(sizes, max_length)
    tokens = _kv_tokens(sizes, device, name, max_batch, length)
    settings = {"collaboration": str(directory), "cache_memory": tokens * sizes[0].kv_per_token}
    proposer = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": drafts}
    flags = [
        *_flags(assistant, sizes[1], device, tokens, max_batch, length),
        *("--speculative-config", json.dumps(proposer)),
        *("--additional-config", json.dumps({SETTINGS: settings})),
        *flags,
    ]
    return ServerPlan(name, assistant.path, flags, {**device.environment, "VLLM_USE_V2_MODEL_RUNNER": "0"})


def _length(sizes: Sequence[ModelMemory], max_length: int | None) -> int:
    return max_length or min(LENGTH, *(size.max_length or LENGTH for size in sizes))


def _kv_tokens(sizes: Sequence[ModelMemory], device: Device, name: str, max_batch: int, length: int) -> int:
    """Number of tokens whose keys and values fit for the models that share a device."""
    tokens = kv_tokens(sizes, USABLE * device.memory_bytes, max_batch * (length + BLOCK_TOKENS))
    if tokens < length + BLOCK_TOKENS:
        raise ConfigError(
            f"beside its weights, the {name} has memory for the keys and values of {max(tokens, 0)} tokens, expected "
            f"at least {length}, the longest sequence; lower --max-model-len, or use more memory or several machines"
        )
    return tokens


def _flags(spec: ModelSpec, size: ModelMemory, device: Device, tokens: int, max_batch: int, length: int) -> list[str]:
    """vLLM's flags for one model on its device."""
    flags = ["--dtype", size.dtype, "--max-model-len", str(length), "--max-num-seqs", str(max_batch)]
    flags += ["--generation-config", "vllm"]  # the model's would change sampling and limit the length
    flags += [] if spec.revision is None else ["--revision", spec.revision]
    return [*flags, *device.flags(size, tokens)]


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
        collaboration: a directory or Hub name.
        logs: directory for vLLM's output.
        python: the interpreter that has vLLM and collm.
        max_batch, max_length, flags: as in `placed_in_one`.
        wait_s: longest time until the engine is up.

    Raises:
        ArtefactError, ConfigError, LoadError: as in `placed_in_one`, `check_python` and `launched`.
    """
    plan = placed_in_one(str(collaboration), Machine.this(), max_batch=max_batch, max_length=max_length, flags=flags)
    with launched([plan], check_python(python, one_engine=True), logs, wait_s=wait_s) as running:
        yield Servers([running[0].url])
