"""Writes causal LMs of transformers as GGUF files, which llama.cpp runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from collm.atomic import atomic_file
from collm.errors import ConfigError, LoadError, MismatchError, MissingExtra, UnsupportedModel
from collm.models.language_model import LanguageModel
from collm.models.llama import LlamaContext, LlamaModel, LlamaToken, llama_installed
from collm.models.loading import ModelSpec, load_config
from collm.models.members import merged_copy, spec_of
from collm.models.names import names_gguf
from collm.text.guards import PROBE
from collm.text.template import PromptTemplate

try:
    import gguf
    from gguf import GGMLQuantizationType, LlamaFileType, TokenType
    from gguf.quants import quantize
except ImportError as error:
    raise MissingExtra("gguf", "gguf") from error

GgufType = Literal["f32", "bf16", "q8_0", "q4_0"]
"""Type of the matrices. All other weights are float32."""

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""transformers' model type -> llama.cpp's architecture."""
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_ROUNDING = {"f32": 1e-3, "bf16": 0.1, "q8_0": 0.3, "q4_0": 1.2}
"""Accepted relative errors of logits. Misplaced weights give 1 to 1.4; for SmolLM2-135M Q8_0 gives 0.1, Q4_0 0.9."""
_BLOCK = 32
"""Q8_0 and Q4_0 have a scale for each 32 weights of a row."""
_CHECKED_TOKENS = 8
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_ADVICE = "decode with transformers instead"


def write_gguf(
    base: nn.Module | ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    kind: GgufType = "q8_0",
) -> PretrainedConfig:
    """Write a causal LM with its tokenizer and chat template as one GGUF file. A LoRA adapter is merged.

    If llama-cpp-python is installed, the file's logits are compared with the model's before it appears.

    Args:
        base: as for `CoLLM`; it is not modified. The hash of its weights (`ModelSpec.identity`) is recorded as
            "collm.source.weights".

    Returns:
        The model's config.

    Raises:
        ConfigError: the model is quantized, or a GGUF file already.
        LoadError: the model cannot be loaded.
        MismatchError: the tokenizer has more tokens than the model.
        UnsupportedModel: a GGUF file cannot hold the model or its tokenizer exactly, or llama.cpp computes other
            logits.
        WriteError: the file could not be written.
    """
    origin = spec_of(base)
    if isinstance(base, LlamaModel) or (isinstance(base, ModelSpec) and names_gguf(base.path)):
        raise ConfigError(f"the base is a GGUF file already ({cast(ModelSpec, origin).path}); use it as it is")
    if isinstance(base, ModelSpec):
        _check_config(load_config(base))  # before the weights are loaded
    model = merged_copy(base)
    _check_config(model.config)
    if any(one.dtype not in (torch.float32, torch.float16, torch.bfloat16) for one in model.parameters()):
        raise ConfigError("the base is quantized, so its weights cannot be exported; use the original checkpoint")
    digest = origin.identity()["weights"] if origin is not None else None
    with atomic_file(path.resolve()) as temporary:
        _write(temporary, model, tokenizer, kind, {} if digest is None else {"collm.source.weights": digest})
        if llama_installed():
            _check_logits(temporary, model, kind)
    return cast(PretrainedConfig, model.config)


def _write(
    file: Path, model: Any, tokenizer: PreTrainedTokenizerBase, kind: GgufType, metadata: dict[str, str]
) -> None:
    architecture, config = ARCHITECTURES[model.config.model_type], model.config
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    _add_config(writer, config)
    _add_tokenizer(writer, tokenizer, rows=config.vocab_size)
    writer.add_file_type(_FILE_TYPES[kind])
    for key, value in metadata.items():
        writer.add_string(key, value)
    tensors = dict(_tensors(model, architecture))
    for name, tensor in tensors.items():
        stored = _tensor_type(name, tensor, kind)
        size = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, stored))
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():  # one at a time in float32
        values = tensor.detach().float()
        if architecture == gguf.MODEL_ARCH.LLAMA:
            values = _turned(name, values, config)
        writer.write_tensor_data(quantize(values.numpy(), _tensor_type(name, tensor, kind)))
    writer.close()


@torch.inference_mode()
def _check_logits(file: Path, model: Any, kind: GgufType) -> None:
    """Raise an UnsupportedModel if llama.cpp computes other logits with the file than transformers with the model."""
    language = LanguageModel(model, name="the model")
    generator = torch.Generator().manual_seed(0)
    written = min(_CHECKED_TOKENS, _context_length(model.config))
    text = torch.randint(language.vocab_size, (written,), generator=generator)
    expected = model(input_ids=text[None], use_cache=False).logits[0].float()
    try:
        context = LlamaContext(LlamaModel(file, name="the file", device="cpu"), positions=written)
    except LoadError as error:
        raise UnsupportedModel(f"llama.cpp does not load the file that was written: {error}") from error
    actual, _ = context.decode([LlamaToken(0, i, token_id, True) for i, token_id in enumerate(text.tolist())])
    scale = (expected - expected.mean(-1, keepdim=True)).norm()
    relative = float((actual - expected).norm() / scale) if scale else 0.0
    if not relative <= _ROUNDING[kind if model.dtype == torch.float32 or kind != "f32" else "bf16"]:
        what = f"llama.cpp's logits of the file have a relative error of {relative:.2g}"
        raise UnsupportedModel(f"{what}, so it cannot run this {type(model).__name__} as {kind}; {_ADVICE}")


def _check_config(config: Any) -> None:
    """Check that the metadata of a GGUF file can state what the model computes."""
    if config.model_type not in ARCHITECTURES:
        what = f"a model of the type {config.model_type} cannot be written as GGUF"
        raise UnsupportedModel(f"{what}, expected one of {', '.join(ARCHITECTURES)}; use llama.cpp's own converter")
    rope = config.rope_parameters
    scaling = rope.get("rope_type", "default")
    if scaling != "default" and (scaling != "llama3" or ARCHITECTURES[config.model_type] != gguf.MODEL_ARCH.LLAMA):
        what = f"rotary positions of the type {scaling} cannot be written for a model of the type {config.model_type}"
        raise UnsupportedModel(f"{what}, expected default, or llama3 in a llama; {_ADVICE}")
    expected = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "attention_bias": False, "mlp_bias": False}
    for name, value in expected.items():
        if (found := getattr(config, name, rope.get(name, value))) not in (value, None):
            raise UnsupportedModel(f"the config of the model has {name} {found}, expected {value}; {_ADVICE}")


def _context_length(config: Any) -> int:
    """Number of positions within which a sliding window, which the file does not state, has no effect."""
    window = getattr(config, "sliding_window", None)
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _tensors(model: Any, architecture: gguf.MODEL_ARCH) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names and the weights; of tied ones the first."""
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise UnsupportedModel(f"llama.cpp has no name for the weight {name} of the model; {_ADVICE}")
        yield stored, parameter
    if model.config.rope_parameters.get("rope_type", "default") == "llama3":
        size = _head_dim(model.config)
        plain = model.config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size)
        yield "rope_freqs.weight", plain / model.model.rotary_emb.inv_freq


def _tensor_type(name: str, tensor: Tensor, kind: GgufType) -> GGMLQuantizationType:
    if tensor.ndim == 1 or (kind in ("q8_0", "q4_0") and tensor.shape[-1] % _BLOCK):
        return GGMLQuantizationType.F32
    if kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
        return GGMLQuantizationType.Q8_0  # 4 bits lose too much there
    return GGMLQuantizationType[kind.upper()]


def _turned(name: str, values: Tensor, config: Any) -> Tensor:
    """Queries and keys with the two halves of each head interleaved, as llama.cpp rotates neighbours in a llama."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    halves = values.reshape(heads, 2, len(values) // heads // 2, -1)
    return halves.transpose(1, 2).reshape(values.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, rows: int) -> None:
    """Write the tokens, padded to the number of rows of the embedding, and how text is split into them."""
    texts = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    if max(texts) >= rows:
        sizes = f"the tokenizer has {max(texts) + 1} tokens, but the model only {rows}"
        raise MismatchError(f"{sizes}; use the tokenizer that belongs to the model")
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str())["model"] if backend is not None else {}
    if backend is None or content["type"] != "BPE":
        what = f"a {content.get('type', type(tokenizer).__name__)} tokenizer cannot be written"
        raise UnsupportedModel(f"{what}, expected BPE; use llama.cpp's own converter")
    kinds = [TokenType.NORMAL if token_id in texts else TokenType.UNUSED for token_id in range(rows)]
    for token_id, token in tokenizer.added_tokens_decoder.items():
        kinds[token_id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    writer.add_token_list([texts.get(token_id, f"[PAD{token_id}]") for token_id in range(rows)])
    merges = [one.split(" ") if isinstance(one, str) else one for one in content["merges"]]
    if content["byte_fallback"]:  # as in SentencePiece
        for token_id in (token_id for token_id, text in texts.items() if _BYTE.fullmatch(text)):
            kinds[token_id] = TokenType.BYTE
        if tokenizer.unk_token_id is not None:
            kinds[tokenizer.unk_token_id] = TokenType.UNKNOWN
        ranks = {"".join(merge): rank for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(ranks.get(texts.get(one, ""), len(merges))) for one in range(rows)])
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("\N{LOWER ONE EIGHTH BLOCK}"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(backend))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_types(kinds)
    for role in ("bos", "eos", "unk", "pad"):
        if (token_id := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(token_id)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if (template := PromptTemplate.of(tokenizer).chat) is not None:
        writer.add_chat_template(template)


def _splitting(backend: Tokenizer) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer splits a text before it merges bytes."""
    by_bytes = partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    known: dict[str, Any] = {
        "gpt-2": by_bytes(),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes()]),
    }
    for name in ("llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"):
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
        known[name] = pre_tokenizers.Sequence([split, by_bytes(use_regex=False)])
    own = cast(Any, backend.pre_tokenizer)
    texts = (PROBE, "It's 12345 DON'T\r\n\r\n  x  \n camelCase/path!? नमस्ते")
    for name, one in known.items():
        if own is not None and all(own.pre_tokenize_str(text) == one.pre_tokenize_str(text) for text in texts):
            return name
    raise UnsupportedModel(f"the tokenizer splits text in another way than {', '.join(known)} do; {_ADVICE}")
