"""The check at load: a model on KV slots gives the logits of its forward pass without a cache."""

from __future__ import annotations

import torch

from collm.errors import ModelFailure, UnsupportedModel
from collm.models.assistant import Assistant
from collm.models.language_model import LanguageModel

CHECK_POSITIONS = 256
"""Cache positions that the check needs."""
_RELATIVE_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


@torch.inference_mode()
def check_against_plain_forward(model: LanguageModel, runner: Assistant) -> None:
    """Compare ragged extends, a rollback and a catch-up with forward passes without a cache."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(model.vocab_size, (2, 8), generator=generator).tolist()
    ids = [torch.tensor([text], device=model.input_device) for text in (texts[0], texts[1][:5])]
    logits = [model.module(input_ids=each, use_cache=False).logits[0, -1, : model.vocab_size] for each in ids]
    expected = torch.stack(logits).float()
    subject = (
        f"{model.name} ({type(model.module).__name__}) cannot run on KV slots: compared with its forward pass without "
        "a cache,"
    )
    advice = "use a model whose attention uses transformers' AttentionInterface and keeps all keys"
    try:
        long, short = runner.open([]), runner.open([])
        runner.extend({long: texts[0][:6], short: texts[1][:2]})
        runner.rollback(long, 3)
        runner.extend({short: texts[1][2:3]})
        actual = runner.extend({short: texts[1][3:5], long: texts[0][3:]}).logits.flip(0)
        runner.close(long)
        runner.close(short)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise UnsupportedModel(f"{subject} it fails with {type(error).__name__}: {error}; {advice}") from error
    if not expected.isfinite().all():
        raise ModelFailure(f"{model.name} gives logits that are not finite; check its weights, config and dtype")
    scale = (expected - expected.mean(-1, keepdim=True)).norm()
    relative = float((actual.float() - expected).norm() / scale) if scale else 0.0
    if not relative <= _RELATIVE_ERROR.get(actual.dtype, 0.1):
        raise UnsupportedModel(f"{subject} its logits have a relative error of {relative:.2g}; {advice}")
