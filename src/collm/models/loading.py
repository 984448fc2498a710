"""Loading models and tokenizers from directories, GGUF files and the Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, cast

import torch
import transformers
from tokenizers import Tokenizer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.gguf import read_gguf_metadata
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from collm.errors import CollmError, ConfigError, LoadError, MissingExtra
from collm.models.adapters import check_adapter
from collm.models.checks import ATTENTIONS, check_config, check_gguf, quantized_with
from collm.models.language_model import eos_set
from collm.models.llama import llama_installed
from collm.models.names import GGUF, absolute, gguf_file, hint, looks_like_path, names_gguf
from collm.text.token_ids import MAX_GROWTH, normalizer_growth

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("nf4", "int8")
SMALL_BYTES = 1 << 30
"""Size below which no progress bar is shown."""

_LOADING = threading.RLock()
_REPORTS = logging.getLogger("transformers.modeling_utils")


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from and how to load it.

    Attributes:
        path: a directory, a GGUF file, a Hub repository id, or repo:file.gguf for a GGUF file on the Hub.
        revision: Hub branch, tag or commit.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16". With "auto" a GGUF file runs in llama.cpp with its
            quantized weights. With another dtype, or without llama-cpp-python, it is dequantized.
        device: "cpu", "cuda", "cuda:1", "auto" (spread by Accelerate), or None: the GPU if there is one.
        attention: attention implementation outside the KV slots (training, scoring), one of transformers' own; None
            lets it choose.
        quantization: quantization by bitsandbytes of all linear layers except the output layer: "nf4" (4 bits with
            double quantization, as in QLoRA, arXiv 2305.14314) or "int8". Layers compute in `dtype`, or in bfloat16
            if that is "auto".
        adapter: directory of a LoRA adapter of the model, as PEFT saves it. Authors of one collaboration that differ
            in nothing else share the weights in memory. A GGUF file with an adapter is dequantized.

    Raises:
        ConfigError: the dtype, attention or quantization is unknown, or a GGUF file has a quantization.
    """

    path: str
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    attention: str | None = None
    quantization: str | None = None
    adapter: str | None = None
    table: ClassVar[None] = None
    is_user_function: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("quantization", QUANTIZATIONS), ("attention", ATTENTIONS)):
            value = getattr(self, name)
            if value not in known and (value is not None or name == "dtype"):
                raise ConfigError(f"{name} of {self.path} is {value!r}, expected one of {', '.join(known)}")
        if self.quantization is not None and names_gguf(self.path):
            advice = f"leave {self.quantization} out, or use the original checkpoint"
            raise ConfigError(f"{self.path} is a GGUF file, which collm cannot quantize; {advice}")
        if names_gguf(self.path) and self.dtype == "auto" and not llama_installed():
            object.__setattr__(self, "dtype", "float32")
        if self.in_llama and self.attention is not None:
            reason = f"attention {self.attention} has no effect on {self.path}, which llama.cpp runs"
            raise ConfigError(f"{reason}; leave it out, or name a dtype, such as float32, to dequantize the file")
        # an artefact must not depend on the working directory
        object.__setattr__(self, "path", absolute(self.path))
        object.__setattr__(self, "adapter", self.adapter and absolute(self.adapter))

    @classmethod
    def parse(cls, name: str, **options: Any) -> ModelSpec:
        """Parse "MODEL", "MODEL@REVISION", "MODEL+ADAPTER" or "MODEL@REVISION+ADAPTER", with further fields."""
        model, plus, adapter = name.rpartition("+")
        if not plus or Path(name).expanduser().exists():
            model, adapter = name, ""
        path, at, revision = model.rpartition("@")
        if not at or Path(model).expanduser().exists():
            path, revision = model, ""
        return cls(path, revision or None, adapter=adapter or None, **options)

    @property
    def name(self) -> str:
        """The text that `parse` reads."""
        parts = (("", self.path), ("@", self.revision), ("+", self.adapter))
        return "".join(sign + part for sign, part in parts if part)

    @property
    def in_llama(self) -> bool:
        """Whether llama.cpp runs the model."""
        return names_gguf(self.path) and self.dtype == "auto" and self.adapter is None

    def dequantized(self) -> ModelSpec:
        """The spec to run the model in transformers, in float32 where llama.cpp would run it."""
        return replace(self, dtype="float32") if self.in_llama else self

    def identity(self) -> dict[str, Any]:
        """The properties that the model's scores depend on."""
        described = {name: getattr(self, name) for name in ("revision", "dtype", "quantization")}
        path = self.path if self.adapter is None else f"{self.path}+{self.adapter}"
        return {"path": path, **described, "weights": _weights_digest(*filter(None, (self.path, self.adapter)))}


def _weights_digest(*paths: str) -> str | None:
    """SHA-256 over samples of local weight files, to detect retraining; None for a model on the Hub."""
    files: list[Path] = []
    for path in paths:
        found = [Path(path)] if names_gguf(path) else [*Path(path).glob("*.safetensors"), *Path(path).glob("*.bin")]
        files += sorted(file for file in found if file.is_file())
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(4096, size // 256)):
                stream.seek(start)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def load_model(spec: ModelSpec) -> PreTrainedModel:
    """Load a causal LM in evaluation mode, without its adapter. transformers dequantizes the weights of a GGUF file."""
    config = load_config(spec)
    method = quantized_with(config)
    device = spec.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"dtype": spec.dtype, "device_map": device}
    if spec.attention is not None:
        options["attn_implementation"] = spec.attention
    if names_gguf(spec.path):
        # otherwise kernels from the Hub would run
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if spec.quantization is not None:
        options |= _quantization(spec, method)
    _check_no_adapter(spec)
    with _explained("model", spec, method), _source(spec) as source, quiet_if_small(spec.path):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            config=config, output_loading_info=True, ignore_mismatched_sizes=True, **source, **options
        )
    for name, saved, expected in sorted(found["mismatched_keys"]):
        shapes = f"shape {tuple(saved)}, but its config.json requires {tuple(expected)}"
        raise LoadError(f"the weight {name} of {spec.path!r} has {shapes}; restore matching files")
    if missing := sorted(found["missing_keys"]):
        lacking = f"{len(missing)} tensors that its config.json requires, such as {missing[0]!r}"
        raise LoadError(f"the weights of {spec.path!r} lack {lacking}; restore matching files")
    if names_gguf(spec.path):
        model.name_or_path = model.config.name_or_path = spec.path
        model.config._commit_hash = spec.revision
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # 4-bit weights would be repacked and have no gradients
            module.support_avx512bf16_for_cpu = False
    return cast(PreTrainedModel, model.eval())


def _quantization(spec: ModelSpec, method: str | None) -> dict[str, Any]:
    """Loading options that quantize a model, whose checkpoint is quantized with `method`."""
    if method is not None:
        raise LoadError(
            f"{spec.path!r} is already quantized with {method}; leave {spec.quantization} out, or use the original one"
        )
    if find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quantize")
    dtype = "bfloat16" if spec.dtype == "auto" else spec.dtype
    settings: dict[str, Any] = {"load_in_8bit": True}
    if spec.quantization == "nf4":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        settings["bnb_4bit_compute_dtype"] = getattr(torch, dtype)
    return {"dtype": dtype, "quantization_config": transformers.BitsAndBytesConfig(**settings)}


def _check_no_adapter(spec: ModelSpec) -> None:
    """Check that there is no adapter next to the weights, which transformers would load unchecked."""
    if find_spec("peft") is None or names_gguf(spec.path):
        return
    with _explained("model", spec):
        found = find_adapter_config_file(spec.path, revision=spec.revision)
    if found is not None:
        advice = "merge them with peft's merge_and_unload, or remove the adapter"
        raise LoadError(f"{spec.path!r} contains an adapter next to a model (adapter_config.json); {advice}")


@contextmanager
def _source(spec: ModelSpec) -> Iterator[dict[str, Any]]:
    """Arguments of `from_pretrained` that locate a model's files and forbid remote code."""
    source = {"pretrained_model_name_or_path": spec.path, "revision": spec.revision, "trust_remote_code": False}
    if names_gguf(spec.path):
        file = gguf_file(spec.path, spec.revision)
        with TemporaryDirectory() as empty:  # so that files next to the GGUF file are not read
            yield {**source, "pretrained_model_name_or_path": empty, "gguf_file": str(file)}
        return
    place = Path(spec.path).expanduser()
    if looks_like_path(spec.path) and not place.exists():  # transformers would search the Hub
        raise LoadError(f"there is no model at {spec.path!r}: no such directory{hint(place)}")
    if not (place / "config.json").exists() and (found := sorted(place.glob(f"*{GGUF}"))):
        raise LoadError(f"{spec.path!r} has GGUF files but no config.json; give the path of a file: {str(found[0])!r}")
    yield source


@contextmanager
def _explained(what: str, spec: ModelSpec, method: str | None = None) -> Iterator[None]:
    """Turn whatever the libraries raise on untrusted files into a LoadError that says what to do."""
    try:
        yield
    except CollmError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(" ".join(lines[:2] if lines[0].rstrip().endswith(":") else lines[:1]).split())
        advice = "expected a directory written by save_pretrained, a GGUF file or a Hub repository id"
        if method is not None:
            what, advice = f"{what} quantized with {method}", "follow this advice, or use the original checkpoint"
        elif names_gguf(spec.path):
            damaged = "" if "not supported" in reason else "the file is damaged or truncated: download it again, or "
            advice = f"{damaged}use the original checkpoint"
        raise LoadError(f"could not load the {what} of {spec.path!r}: {reason.rstrip('.'):.500}; {advice}") from error


@contextmanager
def quiet_if_small(model: str | nn.Module) -> Iterator[None]:
    """Disable transformers' progress bars for a small local model, and warnings that `load_model` raises as errors.

    One thread is inside at a time, because these settings, and others that transformers changes, are the process's.
    """
    with _LOADING, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        shown = transformers_logging.is_progress_bar_enabled()
        if isinstance(model, nn.Module):
            sizes = [parameter.nbytes for parameter in model.parameters()]
        else:
            sizes = [file.stat().st_size for file in (Path(model), *Path(model).glob("*")) if file.is_file()]
        if sizes and sum(sizes) < SMALL_BYTES:  # a download may take long
            transformers_logging.disable_progress_bar()
        _REPORTS.addFilter(_is_no_error)
        try:
            yield
        finally:
            _REPORTS.removeFilter(_is_no_error)
            if shown:
                transformers_logging.enable_progress_bar()


def _is_no_error(record: logging.LogRecord) -> bool:
    return not any(word in record.getMessage() for word in ("MISSING:", "MISMATCH:"))


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """Load and check the config of a model."""
    with _explained("config", spec), _source(spec) as source:
        config = transformers.AutoConfig.from_pretrained(**source)
        if file := source.get("gguf_file"):
            check_gguf(spec.path, file, config)
    check_config(config, spec.path, spec.attention)
    return config


def empty_model(spec: ModelSpec) -> PreTrainedModel:
    """Create a causal LM without weights (on the meta device) from its config."""
    config = load_config(spec)
    with _explained("config", spec), torch.device("meta"):
        return cast(PreTrainedModel, transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def saved_eos_ids(spec: ModelSpec) -> frozenset[int]:
    """The EOS token ids of a model's generation config, without loading the model."""
    if names_gguf(spec.path):  # it has only the tokenizer's EOS
        return frozenset()
    with _explained("generation config", spec):
        try:
            config = transformers.GenerationConfig.from_pretrained(spec.path, revision=spec.revision)
        except (OSError, ValueError):
            return frozenset()
    return eos_set(config.eos_token_id, spec.path)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, unless its normaliser may blow up texts."""
    with _explained("tokenizer", spec), _source(spec) as source:
        if file := source.get("gguf_file"):
            # AutoTokenizer takes ten times as long
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(**source)
            _drop_additions(tokenizer, file)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        growth = normalizer_growth(tokenizer)
    tokenizer.name_or_path = spec.path
    if growth > MAX_GROWTH:
        limit = f"{growth} times longer, expected at most {MAX_GROWTH} times"
        raise LoadError(f"the normaliser of the tokenizer of {spec.path!r} may make a text {limit}; use another one")
    return cast(PreTrainedTokenizerBase, tokenizer)


def _drop_additions(tokenizer: Any, file: str) -> None:
    """Remove tokens that the GGUF file does not have, such as the <|endoftext|> that transformers adds."""
    size = read_gguf_metadata(file)[0]["tokenizer.ggml.tokens"]
    if len(tokenizer) > size:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))


def load_adapted(spec: ModelSpec, model: nn.Module | None = None) -> nn.Module:
    """Load a causal LM with its adapter, if it has one.

    Args:
        model: the model itself, if it is in memory. The adapter goes into its modules.

    Raises:
        LoadError: the model or the adapter cannot be loaded, or the adapter is not plain LoRA.
        MissingExtra: an adapter without peft installed.
    """
    if spec.adapter is None:
        return load_model(spec) if model is None else model
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtra("peft", "train") from error
    adapter = Path(spec.adapter).resolve()  # a short relative path might be mistaken for a Hub id
    check_adapter(adapter)
    base: Any = load_model(spec) if model is None else model
    try:
        with quiet_if_small(base), warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted = cast(Any, PeftModel.from_pretrained(base, adapter)).eval()
    except Exception as error:  # peft may raise anything on untrusted files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LoadError(f"could not load the adapter {adapter}: {reason:.300}; restore it or train again") from error
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = spec.path  # read when the model is saved
    return cast(nn.Module, adapted)


def with_shared_weights(model: nn.Module) -> nn.Module:
    """A copy of a model with its own modules and config, but the same tensors. An adapter goes into one copy only."""
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    shared += [module.quant_state for module in model.modules() if hasattr(module, "quant_state")]  # of 4-bit weights
    return deepcopy(model, {id(one): one for one in shared})
