"""Which server gets what of one machine: its GPUs or threads, and memory for keys and values."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from collm import artefact
from collm.errors import ConfigError
from collm.models.loading import ModelSpec, empty_model
from collm.models.names import names_gguf
from collm.vllm import PROPOSER, SETTINGS
from collm.vllm.launch import ServerPlan, check_engine_python, launched
from collm.vllm.servers import Servers

USABLE = 0.9
"""Share of a device's memory that servers may take."""
OVERHEAD_BYTES = 2 << 30
"""For a server's activations, CUDA graphs and libraries; of a CPU, its interpreter."""
DRAFTS = 12
"""Most tokens that the base of one engine writes before the assistant reads them."""
BLOCK_TOKENS = 32
"""Tokens a sequence may leave unused in its last block of the cache; CPU builds take multiples of 32."""


@dataclass(frozen=True)
class Footprint:
    """What a model takes, in bytes.

    Attributes:
        weights: of all of it.
        kv_per_token: keys and values of one token in all layers; more than that where layers share or compress them.
        max_length: tokens that it was made to read.
        dtype: that it is saved in, or is to be loaded in; vLLM left alone halves float32.
    """

    weights: int
    kv_per_token: int
    max_length: int
    dtype: str

    @classmethod
    def of(cls, spec: ModelSpec) -> Footprint:
        """From a model's config; its weights are not read.

        Raises:
            ConfigError: it is to be quantized, or is a GGUF file.
            LoadError: there is no config of a causal LM.
        """
        if spec.quantization is not None:
            raise ConfigError(
                f"{spec.path} is to be quantized ({spec.quantization}), which is not launched; start a server of a "
                "quantized checkpoint yourself and name it with --servers"
            )
        if names_gguf(spec.path):
            raise ConfigError(
                f"{spec.path} is a GGUF file, which is not launched; start a server of it yourself and name it with "
                "--servers, or name the original checkpoint"
            )
        model = empty_model(spec)
        config: Any = model.config
        text = config.get_text_config()
        dtype = (config.dtype or torch.float32) if spec.dtype == "auto" else getattr(torch, spec.dtype)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            weights=sum(weight.numel() for weight in model.parameters()) * dtype.itemsize,
            kv_per_token=2 * text.num_hidden_layers * heads * width * dtype.itemsize,
            max_length=text.max_position_embeddings,
            dtype=str(dtype).removeprefix("torch."),
        )


@dataclass(frozen=True)
class Machine:
    """What there is.

    Attributes:
        gpu_bytes: memory of each GPU; none on a CPU.
        memory_bytes: main memory that is free.
        cores: how many this process may use.
    """

    gpu_bytes: Sequence[int]
    memory_bytes: int
    cores: int

    @classmethod
    def this(cls) -> Machine:
        """The one at hand."""
        gpus = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
        return cls(gpus, psutil.virtual_memory().available, len(os.sched_getaffinity(0)))

    def devices(self, count: int) -> list[Device]:
        """What each of so many servers runs on: GPUs if there are some, else threads."""
        if self.gpu_bytes:
            groups = gpus_for(len(self.gpu_bytes), count)
            return [Device(group, 0, sum(self.gpu_bytes[gpu] for gpu in group)) for group in groups]
        return [Device((), max(1, self.cores // count), self.memory_bytes)] * count


@dataclass(frozen=True)
class Device:
    """What one server runs on.

    Attributes:
        gpus: their numbers; servers with the same ones share them, and all without share the main memory.
        threads: of a server without GPUs.
        memory_bytes: of its GPUs together, or the main memory that is free.
    """

    gpus: Sequence[int]
    threads: int
    memory_bytes: int

    @property
    def environment(self) -> dict[str, str]:
        """Variables that keep a server to it; more threads than cores stall each other.

        vLLM on a CPU would put the model into a process of its own, and both processes of a server then spin while they
        wait for each other's messages, which leaves few cores little time for anything else.
        """
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus))}
        return {"OMP_NUM_THREADS": str(self.threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

    def flags(self, size: Footprint, tokens: int) -> list[str]:
        """Flags of vLLM, with memory for the keys and values of so many tokens."""
        each = -(-tokens * size.kv_per_token // max(1, len(self.gpus)))
        flags = ["--kv-cache-memory-bytes", str(each)]
        if not self.gpus:
            return [
                *flags,
                "--enforce-eager",
                "--block-size",
                str(BLOCK_TOKENS),
                "--distributed-executor-backend",
                "uni",
            ]
        taken = size.weights + tokens * size.kv_per_token + OVERHEAD_BYTES * len(self.gpus)
        share = f"{min(USABLE, taken / self.memory_bytes):.3f}"
        return [*flags, "--tensor-parallel-size", str(len(self.gpus)), "--gpu-memory-utilization", share]


def fits_in_one(collaboration: str) -> bool:
    """Whether it has one assistant, and that is a language model.

    Raises:
        ArtefactError: there is no collaboration.
    """
    manifest = artefact.read_manifest(artefact.local_directory(collaboration, None))
    return len(manifest.assistants) == 1 and isinstance(manifest.assistants[0], ModelSpec)


def placed_in_one(
    collaboration: str,
    machine: Machine,
    *,
    max_batch: int,
    max_length: int | None = None,
    drafts: int = DRAFTS,
    flags: Sequence[str] = (),
) -> ServerPlan:
    """One server that holds base and assistant (`inline`) on all GPUs, or all threads, of a machine.

    Both models keep what they have read, so each gets memory for as many tokens. The base is on the first GPU.

    Args:
        collaboration: a directory or Hub name.
        max_batch, max_length: as of `placed`.
        drafts: most tokens that the base writes before the assistant reads them.
        flags: of vLLM, after the others.

    Raises:
        ArtefactError: there is no collaboration.
        ConfigError: it does not fit in one engine, or as of `placed`.
        LoadError: as of `placed`.
    """
    if not fits_in_one(collaboration):
        raise ConfigError(
            f"one engine holds a base and one language model as its assistant, and {collaboration} has other "
            "assistants; use a server for each of them ('collm launch'), or engine 'local'"
        )
    directory = artefact.local_directory(collaboration, None)
    manifest = artefact.read_manifest(directory)
    assistant = Served("assistant", cast(ModelSpec, artefact.placed(manifest.assistants[0], directory)), flags)
    sizes = [Footprint.of(artefact.base_of(manifest, directory)), Footprint.of(assistant.spec)]
    (device,) = machine.devices(1)
    length = max_length or min(8192, *(size.max_length for size in sizes))
    tokens = _kv_tokens(sizes, device, assistant.name, max_batch=max_batch, length=length)
    own = {"collaboration": str(directory), "cache_memory": tokens * sizes[0].kv_per_token}
    proposer = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": drafts}
    flags = [
        *_flags(assistant, sizes[1], device, tokens, max_batch=max_batch, length=length),
        *("--speculative-config", json.dumps(proposer)),
        *("--additional-config", json.dumps({SETTINGS: own})),
        *assistant.flags,
    ]
    environment = {**device.environment, "VLLM_USE_V2_MODEL_RUNNER": "0"}
    return ServerPlan(assistant.name, assistant.spec.path, flags, environment)


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
    """Start one engine of vLLM with a collaboration on this machine; the block can connect to it.

        with one_engine("my-run/collaboration", Path("logs")) as servers:
            model = CoLLM.from_pretrained("my-run/collaboration", servers=servers)

    Args:
        collaboration: a directory or Hub name.
        logs: directory for what vLLM prints.
        python: the interpreter that has vLLM and collm.
        max_batch: most requests that run at once.
        max_length, flags: as of `placed_in_one`.
        wait_s: longest time until it is up.

    Raises:
        ArtefactError, ConfigError, LoadError: as of `placed_in_one`, and of `check_engine_python` and `launched`.
    """
    plan = placed_in_one(str(collaboration), Machine.this(), max_batch=max_batch, max_length=max_length, flags=flags)
    with launched([plan], check_engine_python(python), logs, wait_s=wait_s) as running:
        yield Servers([running[0].url])


def _kv_tokens(sizes: Sequence[Footprint], device: Device, name: str, *, max_batch: int, length: int) -> int:
    """Tokens for which the models that share a device can hold keys and values, at least one sequence."""
    tokens = kv_tokens(sizes, USABLE * device.memory_bytes, max_batch * (length + BLOCK_TOKENS))
    if tokens < length + BLOCK_TOKENS:
        raise ConfigError(
            f"beside the weights of the {name} fit keys and values of {max(tokens, 0)} tokens, expected {length}, the "
            "longest sequence; give --max-model-len, more memory, or servers on several machines"
        )
    return tokens


def _flags(served: Served, size: Footprint, device: Device, tokens: int, *, max_batch: int, length: int) -> list[str]:
    """Of vLLM, for one model on its device."""
    flags = ["--dtype", size.dtype, "--max-model-len", str(length), "--max-num-seqs", str(max_batch)]
    flags += ["--generation-config", "vllm"]  # a model's own would change sampling and cap the length
    if served.spec.revision is not None:
        flags += ["--revision", served.spec.revision]
    return [*flags, *device.flags(size, tokens)]


def gpus_for(num_gpus: int, num_servers: int) -> list[list[int]]:
    """GPUs of each server: the first for the base, equal shares of the others for the assistants, powers of two as
    tensor parallelism wants them; with fewer GPUs than servers all share the first. A single server gets all."""
    if num_servers == 1:
        return [list(range(1 << (num_gpus.bit_length() - 1)))]
    if num_gpus < num_servers:
        return [[0]] * num_servers
    each = (num_gpus - 1) // (num_servers - 1)
    size = 1 << (each.bit_length() - 1)
    return [[0], *(list(range(1 + k * size, 1 + (k + 1) * size)) for k in range(num_servers - 1))]


def kv_tokens(models: Sequence[Footprint], memory_bytes: float, wanted: int) -> int:
    """Tokens for which all servers that share a memory can hold keys and values: those wanted, or what fits.

    T = (memory - sum_i (weights_i + overhead)) / sum_i kv_i: base and assistants read the same sequences.
    """
    left = memory_bytes - sum(model.weights + OVERHEAD_BYTES for model in models)
    return min(wanted, int(left // sum(model.kv_per_token for model in models)))


@dataclass(frozen=True)
class Served:
    """A model to be served.

    Attributes:
        name: of its author.
        flags: of vLLM, after those that the placement gives.
    """

    name: str
    spec: ModelSpec
    flags: Sequence[str] = ()


def placed(
    models: Sequence[Served], machine: Machine, *, max_batch: int, max_length: int | None = None
) -> list[ServerPlan]:
    """Servers of one machine that can hold `max_batch` sequences, or as many tokens as fit.

    Args:
        models: the base's first.
        max_length: longest sequence, in tokens; by default what all models read, 8192 at most.

    Raises:
        ConfigError: not even one sequence of that length fits.
        LoadError: as of `Footprint.of`.
    """
    sizes = [Footprint.of(model.spec) for model in models]
    devices = machine.devices(len(models))
    length = max_length or min(8192, *(size.max_length for size in sizes))
    plans = []
    for model, size, device in zip(models, sizes, devices, strict=True):
        beside = [other for other, its in zip(sizes, devices, strict=True) if its.gpus == device.gpus]
        tokens = _kv_tokens(beside, device, model.name, max_batch=max_batch, length=length)
        flags = [*_flags(model, size, device, tokens, max_batch=max_batch, length=length), *model.flags]
        plans.append(ServerPlan(model.name, model.spec.path, flags, device.environment))
    return plans
