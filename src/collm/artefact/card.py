"""The model card of a collaboration."""

from __future__ import annotations

from collm.artefact.manifest import Manifest
from collm.core.calibration import BUDGET_NOTE, Calibration, threshold_text
from collm.core.types import author_name
from collm.models.loading import ModelSpec


def model_card(manifest: Manifest, calibration: Calibration | None) -> str:
    """The model card (README.md) of an artefact."""
    saved = {
        None: "frozen, referenced",
        "base": "tuned, in `base/`",
        "adapter": "LoRA adapter, in `adapter/`",
        "gguf": "exported, in `gguf/`",
    }
    assistants = ""
    for number, spec in enumerate(manifest.assistants, start=1):
        assistants += f"- {author_name(number)}: `{spec.name if isinstance(spec, ModelSpec) else spec}`"
        assistants += ", code that is not included and runs on this machine\n" if spec.is_user_function else "\n"
    lines = (f"- {name}: {value}\n" for name, value in manifest.training.items())
    training = "".join(["## Training\n\n", *lines, "\n"]) if manifest.training else ""
    return f"""---
library_name: collm
tags: [collm, collaborative-decoding]
---

# A collaboration of language models

- base: `{manifest.base.name}` ({saved[manifest.saved_base]})
{assistants}- head: {_head_text(manifest)}
- prompt template: `{manifest.template.text!r}`{", chats too" if manifest.template.chat else ""}

The base writes the text. Where its deferral head exceeds the threshold, an assistant writes the next token
([Co-LLM](https://arxiv.org/abs/2403.03870)).

```python
from collm import CoLLM

out = CoLLM.from_pretrained("this-directory").generate(["..."])
```

{training}{_calibration_text(calibration)}
"""


def _head_text(manifest: Manifest) -> str:
    width, reads = manifest.head["width"], "the base's hidden state"
    reads += " and its doubt" if manifest.head["doubt"] else ""
    return f"{f'a hidden layer of {width} units' if width else 'linear'}, reads {reads}"


def _calibration_text(calibration: Calibration | None) -> str:
    if calibration is None:
        return "Not calibrated: pass a threshold, or run `collm calibrate`."
    name, warning = calibration.metric_name, calibration.warning()
    points = "\n".join(
        f"| {threshold_text(p.threshold)} | {p.deferral_rate:.1%} | {p.rate_low:.1%} - {p.rate_high:.1%} "
        f"| {p.metric:.3f} | {p.low:.3f} - {p.high:.3f} | {', '.join(calibration.uses(p))} |"
        for p in calibration.points
    )
    text = f"""## Calibration

{name} on {calibration.num_prompts} validation prompts; default threshold \
{threshold_text(calibration.best().threshold)}. At threshold 1 only the base writes, below 0 only the assistants.

| threshold | deferral rate | interval | {name} | interval | best |
|--:|--:|--:|--:|--:|---|
{points}"""
    note = BUDGET_NOTE if calibration.budgets else None
    return "\n\n".join([text, *filter(None, [note, warning]), *(check.summary(name) for check in calibration.checks)])
