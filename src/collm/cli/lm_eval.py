"""`collm lm-eval`: the command line of lm-evaluation-harness, run on a collaboration."""

from __future__ import annotations

from typing import Annotated

import typer

PASS_ON = {"allow_extra_args": True, "allow_interspersed_args": False}
MODEL = "collm"
"""What the harness calls it."""


def lm_eval(
    context: typer.Context,
    collaboration: Annotated[str, typer.Argument(metavar="DIR", help="The collaboration: a directory or Hub name.")],
) -> None:
    """Run lm-evaluation-harness: what follows DIR, as --tasks gsm8k, goes to `lm-eval run`, DIR being its model.

    --model_args takes threshold, budget, policy, dtype, trust_code, max_length and add_bos_token. DIR --help lists all
    options of the harness.
    """
    from collm.evaluation.harness import HarnessLM  # says what to install where the harness is missing

    _hand_over(collaboration, context.args, HarnessLM)


def _hand_over(collaboration: str, arguments: list[str], model_class: type) -> None:
    import json
    import sys

    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import setup_logging

    from collm.errors import ConfigError

    setup_logging()
    if MODEL not in model_registry:  # versions after 0.4.13 find it themselves, as an entry point
        model_registry.register(MODEL, target=model_class)
    model_args = json.dumps({"pretrained": collaboration})  # as JSON a name stays as it is, whatever it holds
    sys.argv = ["lm-eval", "run", "--model_args", model_args, "--model", MODEL, *arguments]
    harness = HarnessCLI()
    chosen = harness.parse_args()
    if chosen.model != MODEL or chosen.model_args["pretrained"] != collaboration:
        raise ConfigError(f"the model is {collaboration}; leave --model and pretrained=.. out, or run lm-eval itself")
    if not (chosen.tasks or chosen.config):
        raise ConfigError("nothing says which tasks; add --tasks NAME,.. ('lm-eval ls tasks' lists them)")
    harness.execute(chosen)
