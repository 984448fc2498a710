"""One process of a training run over several: torchrun .. distributed_worker.py OUT [options as JSON]."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, TrainerCallback

from collm.core.head import DeferralHead
from collm.run.train import leave
from collm.training.config import CoLLMConfig
from collm.training.scores import TrainingSet
from collm.training.trainer import CoLLMTrainer
from tests.tiny_models import make_model, tiny_config
from tests.training.conftest import make_scores, random_examples

STEPS = 4
EXAMPLES = random_examples(37, longest=14)  # not a multiple of any batch
KNOWS_HALF = make_scores(EXAMPLES, lambda gold: torch.where(gold % 2 == 0, -0.05, -7.0))
DATA = TrainingSet(EXAMPLES, [KNOWS_HALF])


class StopAfter(TrainerCallback):
    """Ends training after a step that was saved, as a time limit would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def main() -> None:
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    resume = options.pop("resume", False)
    stop_after = options.pop("stop_after", None)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-5,  # with 1e-8 a gradient near 0 turns rounding into a step of its own
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "warm_start": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    with tempfile.TemporaryDirectory() as start:  # loaded when the options are known, as in a run: ZeRO-3 cuts it then
        make_model(tiny_config(), 1).save_pretrained(start)
        config = CoLLMConfig(**{**settings, **options})
        assert config.device.type == "cpu"  # has made the process group
        if config.deepspeed:  # as Accelerate does it on GPUs
            import deepspeed  # takes seconds

            deepspeed.init_distributed(dist_backend="gloo")
        base = AutoModelForCausalLM.from_pretrained(start)
    if config.fsdp:  # which Accelerate would turn into DDP on a CPU, without a word
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    stops = [StopAfter(stop_after)] if stop_after else []
    trainer = CoLLMTrainer(base, DeferralHead(32, 1), config, DATA, DATA, callbacks=stops)
    trainer.train(resume_from_checkpoint=resume or None)
    measured = trainer.evaluate()
    trainer.save_model(str(out / "final"))
    if trainer.is_world_process_zero():
        wrapped = type(trainer.model_wrapped).__name__
        sharded = sum(isinstance(part, FSDPModule) for part in trainer.model_wrapped.modules())
        about = {"measured": measured, "wrapped": wrapped, "sharded": sharded, "processes": trainer.args.world_size}
        (out / "result.json").write_text(json.dumps(about))
    leave()


if __name__ == "__main__":
    main()
