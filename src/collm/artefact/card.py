"""The model card of a collaboration."""

from __future__ import annotations

from collm.artefact.manifest import Manifest
from collm.core.calibration import Calibration, threshold_text
from collm.core.types import author_name
from collm.models.loading import ModelSpec


def model_card(manifest: Manifest, calibration: Calibration | None) -> str:
    """The model card (README.md) of an artefact."""
    saved = {None: "frozen, referenced", "base": "tuned, in `base/`", "adapter": "LoRA adapter, in `adapter/`"}
    foreign = ", code that is not included and runs on this machine"
    assistants = [
        f"- {author_name(k)}: `{spec.path}`"
        if isinstance(spec, ModelSpec)
        else f"- {author_name(k)}: `{spec}`{foreign * spec.is_user_function}"
        for k, spec in enumerate(manifest.assistants, start=1)
    ]
    training = [f"- {name}: {value}" for name, value in manifest.training.items()]
    lines = [
        "---",
        "library_name: collm",
        "tags: [collm, collaborative-decoding]",
        "---",
        "",
        "# A collaboration of language models",
        "",
        f"- base: `{manifest.base.path}` ({saved[manifest.saved_base]})",
        *assistants,
        f"- prompt template: `{manifest.template.text!r}`" + (", chats too" if manifest.template.chat else ""),
        "",
        "The base writes the text. Where its deferral head exceeds the threshold, an assistant writes the next token",
        "([Co-LLM](https://arxiv.org/abs/2403.03870)).",
        "",
        "```python",
        "from collm import CoLLM",
        "",
        'out = CoLLM.from_pretrained("this-directory").generate(["..."])',
        "```",
        "",
        *(["## Training", "", *training, ""] if training else []),
        *_calibration_lines(calibration),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _calibration_lines(calibration: Calibration | None) -> list[str]:
    if calibration is None:
        return ["Not calibrated: pass a threshold, or run `collm calibrate`.", ""]
    best = calibration.best()
    return [
        "## Calibration",
        "",
        f"{calibration.metric_name} on {calibration.num_prompts} validation prompts; default threshold "
        f"{threshold_text(best.threshold)}. At threshold 1 only the base writes, below 0 only the assistants.",
        "",
        f"| threshold | deferral rate | interval | {calibration.metric_name} | interval | best |",
        "|--:|--:|--:|--:|--:|---|",
        *(
            f"| {threshold_text(p.threshold)} | {p.deferral_rate:.1%} | {p.rate_low:.1%} - {p.rate_high:.1%} "
            f"| {p.metric:.3f} | {p.low:.3f} - {p.high:.3f} | {', '.join(calibration.uses(p))} |"
            for p in calibration.points
        ),
        "",
        *(f"{check.summary(calibration.metric_name)}\n" for check in calibration.checks),
    ]
