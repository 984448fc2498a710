"""`collm lm-eval`: run lm-evaluation-harness on a collaboration."""

from __future__ import annotations

import typer

from collm.cli.options import CollaborationArgument

MODEL = "collm"
"""Name of the model type in the harness."""


def lm_eval(context: typer.Context, collaboration: CollaborationArgument) -> None:
    """Run lm-evaluation-harness on a collaboration. Arguments after DIR, such as --tasks gsm8k, go to `lm-eval run`.

    --model_args takes threshold, budget, policy, dtype, trust_code, max_length and add_bos_token. `collm lm-eval DIR
    --help` lists all options of the harness.
    """
    import json
    import sys

    from collm.errors import ConfigError
    from collm.evaluation.harness import HarnessLM  # raises a MissingExtra if the harness is not installed

    # isort: split
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import setup_logging

    setup_logging()
    if MODEL not in model_registry:  # versions after 0.4.13 find it themselves, as an entry point
        model_registry.register(MODEL, target=HarnessLM)
    model_args = json.dumps({"pretrained": collaboration})  # as JSON a name stays as it is, whatever it holds
    sys.argv = ["lm-eval", "run", "--model_args", model_args, "--model", MODEL, *context.args]
    harness = HarnessCLI()
    chosen = harness.parse_args()
    if chosen.model != MODEL or chosen.model_args["pretrained"] != collaboration:
        raise ConfigError(f"the model is {collaboration}; leave --model and pretrained=.. out, or run lm-eval itself")
    if not (chosen.tasks or chosen.config):
        raise ConfigError("nothing says which tasks; add --tasks NAME,.. ('lm-eval ls tasks' lists them)")
    harness.execute(chosen)
