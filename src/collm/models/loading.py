"""Loading models and tokenizers from directories, GGUF files and the Hub."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import (
    find_adapter_config_file,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
)

from collm.errors import ConfigError, LoadError, MissingExtra
from collm.models.adapters import check_adapter
from collm.models.gguf import check_gguf, drop_additions
from collm.models.language_model import eos_set
from collm.models.names import absolute, check_there, gguf_file, names_gguf
from collm.models.progress import quiet_if_small
from collm.models.quantized import check_known, quantized_with
from collm.text.token_ids import MAX_GROWTH, normalizer_growth

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("nf4", "int8")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention implementations of transformers itself. Given a name with a slash, or one of flash attention without its
package, it would download and run a kernel."""

EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""Implementations of mixtures of experts that are part of transformers. Others are kernels from the Hub."""

KERNELS = ("eetq", "fbgemm_fp8", "fp8", "metal", "mxfp4", "nvfp4")
"""Quantization methods for which transformers downloads and runs kernels where the package kernels is installed."""

MAX_LAYERS = 1000
"""Largest accepted number of layers, because layers are allocated before the weights are read."""


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from and how to load it.

    Attributes:
        path: a directory, a GGUF file, a Hub repository id, or repo:file.gguf for a GGUF file on the Hub.
        revision: Hub branch, tag or commit.
        dtype: "auto" (as saved; float32 of a GGUF file), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", "cuda:1", "auto" (spread by Accelerate), or None: the GPU if there is one.
        attention: attention implementation outside the KV slots (training, scoring), one of transformers' own; None
            lets it choose.
        quantization: quantization by bitsandbytes of all linear layers except the output layer: "nf4" (4 bits with
            double quantization, as in QLoRA, arXiv 2305.14314) or "int8". Layers compute in `dtype`, or in bfloat16
            if that is "auto".

    Raises:
        ConfigError: the dtype, attention or quantization is unknown, or a GGUF file has a quantization.
    """

    path: str
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    attention: str | None = None
    quantization: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype of {self.path} is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ConfigError(
                f"quantization of {self.path} is {self.quantization!r}, expected one of {', '.join(QUANTIZATIONS)}"
            )
        if self.attention not in (None, *ATTENTIONS):
            raise ConfigError(
                f"attention of {self.path} is {self.attention!r}, expected one of {', '.join(ATTENTIONS)}"
            )
        if self.quantization is not None and names_gguf(self.path):
            raise ConfigError(
                f"{self.path} is a GGUF file, which collm cannot quantize; leave {self.quantization} out, or use the "
                "original checkpoint"
            )
        object.__setattr__(self, "path", absolute(self.path))  # an artefact must not depend on the working directory

    def identity(self) -> dict[str, Any]:
        """The properties that the model's scores depend on."""
        return {
            "path": self.path,
            "revision": self.revision,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "weights": _weights_digest(self.path),
        }

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, for JSON."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def _weights_digest(path: str) -> str | None:
    """SHA-256 over samples of a local model's weight files, to detect retraining; None for a model on the Hub."""
    found = [Path(path)] if names_gguf(path) else [*Path(path).glob("*.safetensors"), *Path(path).glob("*.bin")]
    files = sorted(file for file in found if file.is_file())
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(4096, size // 256)):
                stream.seek(start)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def default_device() -> str:
    """The first GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(spec: ModelSpec) -> PreTrainedModel:
    """Load a causal LM in evaluation mode. Weights of a GGUF file are dequantized.

    Raises:
        LoadError: there is no model at the path, or transformers cannot load it completely.
        MissingExtra: bitsandbytes or gguf is needed and not installed.
    """
    config = load_config(spec)
    options = _loading_options(spec, config)
    _check_no_adapter(spec)
    with _source(spec) as source:
        try:
            with quiet_if_small(spec.path):
                model, found = AutoModelForCausalLM.from_pretrained(
                    config=config, output_loading_info=True, ignore_mismatched_sizes=True, **source, **options
                )
        except Exception as error:  # the libraries may raise anything on untrusted files
            raise LoadError(_could_not_load("model", spec, error, quantized_with(config))) from error
    if other := sorted(found["mismatched_keys"]):
        name, saved, expected = other[0]
        raise LoadError(
            f"the weight {name} of {spec.path!r} has shape {tuple(saved)}, but its config.json requires "
            f"{tuple(expected)}; restore matching files"
        )
    if missing := sorted(found["missing_keys"]):
        raise LoadError(
            f"the weights of {spec.path!r} lack {len(missing)} tensors that its config.json requires, such as "
            f"{missing[0]!r}; restore matching files"
        )
    if names_gguf(spec.path):
        model.name_or_path = model.config.name_or_path = spec.path
        model.config._commit_hash = spec.revision
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # 4-bit weights would be repacked and have no gradients
            cast(Any, module).support_avx512bf16_for_cpu = False
    return cast(PreTrainedModel, model.eval())


def _loading_options(spec: ModelSpec, config: PretrainedConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": spec.dtype, "device_map": spec.device or default_device()}
    if spec.attention is not None:
        options["attn_implementation"] = spec.attention
    if names_gguf(spec.path):
        options["quantization_config"] = GgufConfig(dequantize=True)  # otherwise kernels from the Hub would run
    if spec.quantization is not None:
        if (method := quantized_with(config)) is not None:
            raise LoadError(
                f"{spec.path!r} is already quantized with {method}; leave {spec.quantization} out, or use the "
                "original checkpoint"
            )
        dtype = "bfloat16" if spec.dtype == "auto" else spec.dtype
        options |= {"dtype": dtype, "quantization_config": _quantization(spec.quantization, dtype)}
    return options


@contextmanager
def _source(spec: ModelSpec) -> Iterator[dict[str, Any]]:
    """Arguments of `from_pretrained` that locate a model's files and forbid remote code."""
    source = {"pretrained_model_name_or_path": spec.path, "revision": spec.revision, "trust_remote_code": False}
    if not names_gguf(spec.path):
        check_there(spec.path)
        yield source
        return
    file = gguf_file(spec.path, spec.revision)
    with TemporaryDirectory() as empty:  # so that files next to the GGUF file are not read
        yield {**source, "pretrained_model_name_or_path": empty, "gguf_file": str(file)}


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """Load the config of a model.

    Raises:
        LoadError: there is no config, it is not supported, or it names an attention kernel that transformers would
            download and run.
        MissingExtra: the model is a GGUF file, and gguf is not installed.
    """
    with _source(spec) as source:
        try:
            config = AutoConfig.from_pretrained(**source)
        except Exception as error:  # the libraries may raise anything on untrusted files
            raise LoadError(_could_not_load("config", spec, error)) from error
        if file := source.get("gguf_file"):
            check_gguf(spec.path, file, config)
    check_known(spec.path, config)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise LoadError(f"the config of {spec.path!r} has num_hidden_layers {layers}, expected at most {MAX_LAYERS}")
    _check_no_kernels(spec, config)
    return config


def _check_no_kernels(spec: ModelSpec, config: PretrainedConfig) -> None:
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for what, option, known in (
        ("attention", "attn_implementation", ATTENTIONS),
        ("experts", "experts_implementation", EXPERTS),
    ):
        for named in (getattr(part, f"_{option}", None) for part in parts):
            if named not in (None, *known):
                raise LoadError(
                    f"the config of {spec.path!r} requires the {what} {named!r}, which is not part of transformers; "
                    f"remove {option} from its config.json"
                )
    asked = [spec.attention] if spec.attention else [getattr(part, "_attn_implementation", None) for part in parts]
    installed = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    for named, is_installed in installed.items():
        if named in asked and not is_installed():
            raise LoadError(
                f"{spec.path!r} requires the attention {named!r}, whose package is not installed or not for this "
                "machine; install it, or choose another attention"
            )
    if is_kernels_available() and (method := quantized_with(config)) in KERNELS:
        raise LoadError(
            f"{spec.path!r} is quantized with {method}, for which transformers would run kernels from the Hub; use the "
            "original checkpoint, or uninstall the package kernels"
        )


def _check_no_adapter(spec: ModelSpec) -> None:
    """Raise a LoadError if there is an adapter next to the weights, which transformers would load unchecked."""
    if find_spec("peft") is None or names_gguf(spec.path):
        return
    try:
        found = find_adapter_config_file(spec.path, revision=spec.revision)
    except Exception as error:  # errors of the Hub
        raise LoadError(_could_not_load("model", spec, error)) from error
    if found is not None:
        raise LoadError(
            f"{spec.path!r} contains an adapter next to a model (adapter_config.json); merge them with peft's "
            "merge_and_unload, or remove the adapter"
        )


def empty_model(spec: ModelSpec) -> PreTrainedModel:
    """Create a causal LM without weights (on the meta device) from its config.

    Raises:
        LoadError: there is no config of a causal LM.
    """
    config = load_config(spec)
    try:
        with torch.device("meta"):
            return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except Exception as error:  # the libraries may raise anything on untrusted files
        raise LoadError(_could_not_load("config", spec, error)) from error


def _quantization(kind: str, dtype: str) -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quantize")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def saved_eos_ids(spec: ModelSpec) -> frozenset[int]:
    """The EOS token ids of a model's generation config, without loading the model.

    Raises:
        LoadError: the config cannot be read, or its EOS setting is invalid.
    """
    if names_gguf(spec.path):  # it has only the tokenizer's EOS
        return frozenset()
    try:
        config = GenerationConfig.from_pretrained(spec.path, revision=spec.revision)
    except (OSError, ValueError):
        return frozenset()
    except Exception as error:  # the libraries may raise anything on untrusted files
        raise LoadError(_could_not_load("generation config", spec, error)) from error
    return eos_set(config.eos_token_id, spec.path)


def stop_ids(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> frozenset[int]:
    """Tokens at which decoding with this base stops: its EOS token ids and the tokenizer's EOS."""
    eos = cast("int | None", tokenizer.eos_token_id)
    return saved_eos_ids(spec) | (frozenset() if eos is None else {eos})


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        LoadError: there is no tokenizer that transformers can load, or its normaliser may blow up texts.
        MissingExtra: the model is a GGUF file, and gguf is not installed.
    """
    with _source(spec) as source:
        try:
            tokenizer = _tokenizer(source)
            growth = normalizer_growth(tokenizer)
        except Exception as error:  # the libraries may raise anything on untrusted files
            raise LoadError(_could_not_load("tokenizer", spec, error)) from error
    tokenizer.name_or_path = spec.path
    if growth > MAX_GROWTH:
        raise LoadError(
            f"the normaliser of the tokenizer of {spec.path!r} may make a text {growth} times longer, expected at "
            f"most {MAX_GROWTH} times; use another tokenizer"
        )
    return tokenizer


def _tokenizer(source: dict[str, Any]) -> PreTrainedTokenizerBase:
    if "gguf_file" not in source:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(**source))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(**source)  # AutoTokenizer takes ten times as long
    drop_additions(tokenizer, source["gguf_file"])
    return cast(PreTrainedTokenizerBase, tokenizer)


def _could_not_load(what: str, spec: ModelSpec, error: Exception | str, method: str | None = None) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = " ".join(lines[:2] if lines[0].rstrip().endswith(":") else lines[:1])
    advice = "expected a directory written by save_pretrained, a GGUF file or a Hub repository id"
    if method is not None:
        what, advice = f"{what} quantized with {method}", "follow this advice, or use the original checkpoint"
    elif names_gguf(spec.path):
        damaged = "" if "not supported" in reason else "the file is damaged or truncated: download it again, or "
        advice = f"{damaged}use the original checkpoint"
    return f"could not load the {what} of {spec.path!r}: {' '.join(reason.split()).rstrip('.'):.500}; {advice}"


def load_with_adapter(spec: ModelSpec, adapter: Path) -> nn.Module:
    """Load a causal LM with the PEFT adapter in a directory.

    Raises:
        LoadError: the model or the adapter cannot be loaded, or the adapter is more than plain LoRA.
        MissingExtra: peft is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtra("peft", "train") from error
    adapter = adapter.resolve()  # a short relative path might be mistaken for a Hub id
    check_adapter(adapter)
    base = load_model(spec)
    try:
        with quiet_if_small(base), warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = cast(Any, PeftModel.from_pretrained(base, adapter)).eval()
    except Exception as error:  # peft may raise anything on untrusted files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LoadError(f"could not load the adapter {adapter}: {reason:.300}; restore it or train again") from error
    for config in model.peft_config.values():
        config.base_model_name_or_path = spec.path  # read when the model is saved
    return cast(nn.Module, model)
