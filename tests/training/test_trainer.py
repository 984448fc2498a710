"""Training lowers the loss, touches only what its method says, and resumes to the same bytes."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TrainerCallback

from collm.core.head import DeferralHead
from collm.errors import ArtefactError, ConfigError, DataError, MismatchError, MissingExtra, ModelFailure, WriteError
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec, load_model
from collm.training.checkpoints import last_checkpoint
from collm.training.examples import collate
from collm.training.scores import Scores, TrainingSet, find_scores
from collm.training.trainer import CoLLMTrainer, fit_head
from tests.training.conftest import Make, Saved, Tiny, make_scores, random_examples, score_examples

EXAMPLES = random_examples(24, longest=14)
KNOWS_HALF = make_scores(EXAMPLES, lambda gold: torch.where(gold % 2 == 0, -0.05, -7.0))
DATA = TrainingSet(EXAMPLES, [KNOWS_HALF])
MakeTrainer = Callable[..., CoLLMTrainer]
METHODS = {
    "full": {"learning_rate": 1e-3},
    "lora": {"learning_rate": 1e-2, "lora_r": 4},
    "head": {"head_learning_rate": 5e-2},
}


@pytest.fixture
def make(tiny_model: Tiny, config: Make) -> MakeTrainer:
    """Makes a trainer: make(data, base=.., eval_dataset=.., callbacks=.., **options)."""

    def made(data: TrainingSet = DATA, base: Any = None, eval_dataset: Any = None, callbacks: Any = (), **options: Any):
        head = options.pop("head", None) or DeferralHead(32, len(data.assistant_scores))
        base = base or tiny_model(1, attention_dropout=0.1)
        return CoLLMTrainer(base, head, config(**options), data, eval_dataset, callbacks=callbacks)

    return made


def weights(trainer: CoLLMTrainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.joint.state_dict().items()}


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


class Kill(TrainerCallback):
    """Ends the process, as far as Python can, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["head", "full", pytest.param("lora", marks=pytest.mark.slow)])
def test_training_lowers_the_marginal_nll(make: MakeTrainer, method: str) -> None:
    options = {**METHODS[method], "num_train_epochs": 6.0}
    trainer = make(eval_dataset=DATA, method=method, **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.05
    if method == "head":
        assert after["eval_base_nll"] == before["eval_base_nll"]
    assert after["eval_loss"] < after["eval_base_nll"]
    assert 0 < after["eval_defer_prob"] < 1


@pytest.mark.slow
def test_a_deferral_cost_is_part_of_the_loss_and_lowers_defer_probs(make: MakeTrainer) -> None:
    trained = []
    for cost in (0.0, 1.0):
        options = {**METHODS["head"], "max_steps": 20, "deferral_cost": cost}
        trainer = make(eval_dataset=DATA, method="head", **options)
        before = trainer.evaluate()
        trainer.train()
        trained.append(trainer.evaluate())
        free = make(eval_dataset=DATA, method="head").evaluate()
        assert before["eval_loss"] == pytest.approx(free["eval_loss"] + cost * free["eval_defer_prob"], rel=1e-5)
    assert trained[1]["eval_defer_prob"] < trained[0]["eval_defer_prob"] - 0.1


def test_evaluate_means_over_tokens_not_batches(make: MakeTrainer) -> None:
    results = [make(eval_dataset=DATA, per_device_eval_batch_size=size).evaluate() for size in (1, 5, 24)]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize("method", ["full", "head"])
def test_what_a_method_moves(make: MakeTrainer, tiny_model: Tiny, method: str) -> None:
    base = tiny_model(1)
    trainer = make(base=base, method=method, head_learning_rate=1e-2, max_steps=3)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert moved == (before.keys() if method == "full" else {"head.weight", "head.bias"})
    assert trainer.base is base


@pytest.mark.slow
def test_an_adapter_leaves_the_base_alone_and_reloads_exactly(
    make: MakeTrainer, tiny_model: Tiny, tmp_path: Path
) -> None:
    from peft import PeftModel

    trainer = make(method="lora", learning_rate=1e-2, lora_r=4, max_steps=3)
    trainer.train()
    after = weights(trainer)
    plain = tiny_model(1).state_dict()
    tuned = {name.replace("base.base_model.model.", "").replace(".base_layer", ""): t for name, t in after.items()}
    assert all(torch.equal(tuned[name], tensor) for name, tensor in plain.items())
    assert any(tensor.abs().sum() > 0 for name, tensor in after.items() if "lora_B" in name)
    assert not any("lm_head" in name and "lora" in name for name in after)

    trainer.save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"adapter", "head.safetensors"}
    reloaded = PeftModel.from_pretrained(tiny_model(1), tmp_path / "saved" / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(ids).logits, trainer.base.eval()(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tuned_base_is_saved_as_a_plain_model_beside_the_head(
    make: MakeTrainer, tiny_model: Tiny, tmp_path: Path, tied: bool
) -> None:
    trainer = make(base=tiny_model(1, tie_word_embeddings=tied), learning_rate=1e-3, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"base", "head.safetensors"}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "base")
    assert same(plain.state_dict(), dict(trainer.base.state_dict()))
    assert plain.config.use_cache
    head = load_file(tmp_path / "saved" / "head.safetensors")
    assert same(head, dict(trainer.head.state_dict()))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_to_the_same_bytes(make: MakeTrainer, tmp_path: Path, method: str) -> None:
    options = {"method": method, **METHODS[method], "max_steps": 9, "save_strategy": "steps", "save_steps": 2}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    undisturbed = make(**options)
    undisturbed.train()
    there = {**options, "output_dir": str(tmp_path / "killed")}
    with pytest.raises(KeyboardInterrupt):
        make(callbacks=[Kill(5)], **there).train()
    (tmp_path / "killed" / "checkpoint-6").mkdir()  # a save that was cut short
    found = last_checkpoint(tmp_path / "killed")
    assert found is not None
    assert found.name == "checkpoint-4"
    resumed = make(**there)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(undisturbed))


@pytest.mark.slow
def test_what_cannot_be_resumed_is_said(make: MakeTrainer, saved_model: Saved, tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ConfigError, match="no complete checkpoint to resume from"):
        make(**options).train(resume_from_checkpoint=True)
    make(**options).train()
    with pytest.raises(ConfigError, match="checkpoint-2 is from an earlier run"):
        make(**options).train()
    run = tmp_path / "run"
    with pytest.raises(ArtefactError, match="nowhere is not a complete checkpoint"):
        make(**options).train(resume_from_checkpoint=run / "nowhere")
    others = random_examples(24, longest=13)
    knows = make_scores(others, lambda gold: torch.where(gold % 2 == 0, -0.05, -7.0))
    for data, more, what in (
        (TrainingSet(others, [knows]), {}, "rows"),
        (TrainingSet(EXAMPLES, [replace(KNOWS_HALF, model={"weights": "x"})]), {}, "assistants"),
        (DATA, {"eval_dataset": DATA}, "evaluation rows"),
        (DATA, {"base": load_model(ModelSpec(str(saved_model("base", 1))))}, "weights of the base"),
    ):
        with pytest.raises(ConfigError, match=f"checkpoint-2 was trained with different {what}"):
            make(data, **more, **options).train(resume_from_checkpoint=True)
    for number, content in enumerate(("", "[]", "{}")):
        shutil.copytree(run / "checkpoint-2", run / f"unknown-{number}")
        (run / f"unknown-{number}" / "trained_on.json").write_text(content)
        with pytest.raises(ArtefactError, match=r"trained_on.json is damaged"):
            make(**options).train(resume_from_checkpoint=run / f"unknown-{number}")
    shutil.copytree(run / "checkpoint-2", run / "damaged")
    with (run / "damaged" / "head.safetensors").open("r+b") as file:
        file.truncate(20)
    with pytest.raises(ArtefactError, match="damaged cannot be read for method 'full'"):
        make(**options).train(resume_from_checkpoint=run / "damaged")
    with pytest.raises(ArtefactError, match="cannot be read for method 'lora'"):
        make(**options, method="lora").train(resume_from_checkpoint=run / "checkpoint-2")


def test_accumulation_equals_one_large_batch(make: MakeTrainer, tiny_model: Tiny, tmp_path: Path) -> None:
    """Token counts differ between the small batches, so a mean of batch means would show."""
    results = []
    for size, steps in ((8, 1), (1, 8)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3}
        trainer = make(base=tiny_model(1), learning_rate=1e-3, **options)
        before = weights(trainer)
        trainer.train()
        results.append(weights(trainer))
    moved = max((results[0][name] - before[name]).abs().max().item() for name in before)
    apart = max((results[0][name] - results[1][name]).abs().max().item() for name in before)
    assert moved > 1e-3
    assert apart < 0.02 * moved


@pytest.mark.parametrize(("given", "rate"), [(None, 0.1 / 32), (0.5, 0.5)])
def test_base_and_head_have_their_learning_rates(make: MakeTrainer, given: float | None, rate: float) -> None:
    rates: dict[str, float] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            for group in optimizer.param_groups:
                rates["head" if any(p is trainer.head.weight for p in group["params"]) else "base"] = group["lr"]

    options = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 1}
    trainer = make(callbacks=[Watch()], head_learning_rate=given, **options)
    trainer.train()
    assert rates == {"base": 1e-3, "head": pytest.approx(rate)}


def test_weak_supervision_reads_labels_of_the_base_before_training(
    make: MakeTrainer, tiny_model: Tiny, score: Any
) -> None:
    """The loss written out: labels from the stored scores, probabilities from the base as it is."""
    base = tiny_model(1)
    stored: Scores = make_scores(EXAMPLES, lambda gold: -0.1 - gold / 50, lambda gold: gold % 4 == 0)
    data = TrainingSet(EXAMPLES, [KNOWS_HALF], stored)
    trainer = make(data, base=base, objective="weak", max_steps=1, warm_start=True)
    torch.nn.init.normal_(trainer.head.weight, generator=torch.Generator().manual_seed(0))
    batch = collate([data[i] for i in range(4)])
    mask = batch["target_mask"]
    loss = trainer.joint(**batch)["loss"]
    out = base(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    language = F.cross_entropy(out.logits[mask], batch["gold"][mask])
    labels = (batch["gold"][mask] % 4 == 2).float()
    u = trainer.head(out.hidden_states[-1][mask])[:, 0]
    heads = F.binary_cross_entropy_with_logits(u, labels, pos_weight=torch.tensor(5.0))
    written = 2 / 3 * language + heads / 3
    assert loss.item() == pytest.approx(written.item(), rel=1e-5)
    parameters = [*base.parameters(), trainer.head.weight]
    for mine, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(written, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    trainer.train()
    assert trainer.warm_start_report is None
    with pytest.raises(ConfigError, match="pseudo-labels need the base's scores"):
        make(objective="weak")


def test_the_objective_that_suits_the_scores_is_chosen_and_said(
    make: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    worse = make_scores(EXAMPLES, lambda gold: -9.0 - gold / 50)
    data = TrainingSet(EXAMPLES, [KNOWS_HALF], worse)
    trainer = make(data, max_steps=1)
    assert (trainer.objective, trainer.deferral_costs) == ("separate", [1.0])
    with caplog.at_level(logging.INFO, "collm.training.trainer"):
        trainer.train()
    assert "objective separate, deferral cost 1, because an assistant is better at 100% of the tokens" in caplog.text
    assert make(data, objective="paper").deferral_costs == [0.0]


def test_the_warm_start_runs_inside_train_unless_resuming(make: MakeTrainer, tiny_model: Tiny, score: Any) -> None:
    base = tiny_model(1)
    base_scores: Scores = score(base, EXAMPLES, "base")
    data = TrainingSet(EXAMPLES, [KNOWS_HALF], base_scores)
    options = {"method": "head", "head_learning_rate": 1e-9, "warm_start": True, "warm_start_tokens": 100}
    options |= {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make(data, base=base, **options)
    trainer.train()
    assert trainer.label_report is not None
    assert trainer.label_report.share == pytest.approx((KNOWS_HALF.corrects & ~base_scores.corrects).float().mean())
    assert trainer.warm_start_report is not None
    assert trainer.warm_start_report["num_tokens"] == 100
    assert trainer.head.weight.abs().sum() > 0.1
    resumed = make(data, base=base, **options, num_train_epochs=1.0)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.warm_start_report is None
    assert same(weights(resumed), weights(trainer))
    with pytest.raises(ConfigError, match="need the base's scores"):
        make(**options)


@pytest.mark.slow
def test_the_best_checkpoint_can_be_loaded_at_the_end(make: MakeTrainer) -> None:
    """A learning rate that ruins the model: the last evaluation is not the best."""
    options = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
    steps = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make(eval_dataset=DATA, **options, **steps, load_best_model_at_end=True)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4
    assert losses[-1] != min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_activation_checkpointing_changes_no_weights(make: MakeTrainer, tiny_model: Tiny) -> None:
    results = []
    for on in (False, True):
        trainer = make(base=tiny_model(1), learning_rate=1e-3, max_steps=2, activation_checkpointing=on)
        trainer.train()
        results.append(weights(trainer))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_nan_stops_training(make: MakeTrainer, tiny_model: Tiny) -> None:
    base = tiny_model(1)
    with torch.no_grad():
        base.lm_head.weight[3] = torch.nan
    with pytest.raises(ModelFailure, match="the loss is nan at step 1"):
        make(base=base, max_steps=2).train()


def test_a_full_disk_is_said_and_leaves_no_whole_checkpoint(
    make: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")

    trainer = make(max_steps=2, save_strategy="steps", save_steps=1)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WriteError, match=r"could not write .*checkpoint-1.*free some space"):
        trainer.train()
    assert last_checkpoint(tmp_path / "run") is None


def test_lora_on_the_output_layer_is_refused_and_undone(make: MakeTrainer, tiny_model: Tiny) -> None:
    base = tiny_model(1)
    with pytest.raises(ConfigError, match="includes the output layer"):
        make(base=base, method="lora", lora_target_modules=["q_proj", "lm_head"])
    assert same(dict(base.state_dict()), dict(tiny_model(1).state_dict()))
    with pytest.raises(ConfigError, match="LoRA cannot be applied to the base"):
        make(base=base, method="lora", lora_target_modules=["nothing"])


def test_lora_without_peft_says_what_to_install(make: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"pip install 'collm\[train\]'"):
        make(method="lora")


def test_what_does_not_fit_is_refused(
    make: MakeTrainer, tiny_model: Tiny, config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(MismatchError, match="has 2 assistants, but the data has scores of 1"):
        CoLLMTrainer(tiny_model(1), DeferralHead(32, 2), config(), DATA)
    for kind, complaint, options in (
        (DataError, r"an example has \d+ tokens, but max_length is 9", {"max_length": 9}),
        (ConfigError, "no effect without an evaluation set", {"eval_strategy": "epoch"}),
        (ConfigError, "already has an adapter", {"base": make(method="lora").base}),
        (ConfigError, "there is no evaluation set", {}),
    ):
        with pytest.raises(kind, match=complaint):
            make(**options).evaluate()
    with caplog.at_level(logging.WARNING):
        make(base=tiny_model(1).bfloat16())
    assert "most updates" in caplog.text


def test_a_training_set_is_of_one_set_of_examples() -> None:
    with pytest.raises(ConfigError, match="scores belong to other examples"):
        TrainingSet(random_examples(24, seed=9), [KNOWS_HALF])


def largest_gap(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert mine.keys() == theirs.keys()
    return max((tensor - theirs[name]).abs().max().item() for name, tensor in mine.items())


SMOOTH = {"learning_rate": 1e-3, "adam_epsilon": 1e-5, "seed": 3}  # no step of its own from rounding near 0


@pytest.mark.parametrize(
    ("common", "changes"),
    [
        pytest.param({}, {"padding_free": True}, marks=pytest.mark.slow),
        pytest.param({"method": "lora", "lora_dropout": 0.0}, {"padding_free": True}, marks=pytest.mark.slow),
        pytest.param(
            {"deferral_cost": 0.5, "max_steps": 2},
            {"torch_compile": True, "torch_compile_backend": "aot_eager"},
            marks=pytest.mark.soak,
        ),
    ],
    ids=["full", "lora", "compiled"],
)
def test_without_padding_or_compiled_training_gives_the_same_weights(
    make: MakeTrainer, tiny_model: Tiny, common: dict[str, Any], changes: dict[str, Any]
) -> None:
    final = []
    torch._dynamo.reset()
    counters.clear()
    for more in ({}, changes):
        assert counters["stats"]["unique_graphs"] == 0
        trainer = make(base=tiny_model(1), eval_dataset=DATA, **SMOOTH, **common, **more)
        trainer.train()
        final.append((weights(trainer), trainer.evaluate()["eval_loss"]))
        assert trainer.evaluate(DATA)["eval_loss"] == pytest.approx(final[-1][1], rel=1e-6)
    assert (counters["stats"]["unique_graphs"] > 0) is ("torch_compile" in changes)
    assert not counters["graph_break"], "more than the base was compiled"
    assert largest_gap(final[0][0], final[1][0]) < 1e-5
    assert final[0][1] == pytest.approx(final[1][1], rel=1e-5)


def test_attention_that_mixes_sequences_is_refused(make: MakeTrainer, tiny_model: Tiny) -> None:
    base = tiny_model(1)
    plain = type(base.model).forward

    def deaf(self: Any, input_ids: Tensor, position_ids: Tensor | None = None, **rest: Any) -> Any:
        return plain(self, input_ids, attention_mask=torch.ones_like(input_ids), position_ids=position_ids, **rest)

    base.model.forward = deaf.__get__(base.model)
    with pytest.raises(ConfigError, match="sequences in one row attend to each other"):
        make(base=base, padding_free=True)


@pytest.mark.slow
def test_bf16_computes_in_bf16_and_keeps_fp32_weights(make: MakeTrainer, tiny_model: Tiny) -> None:
    measured = []
    for bf16 in (False, True):
        trainer = make(base=tiny_model(1), eval_dataset=DATA, **SMOOTH, bf16=bf16)
        trainer.train()
        assert all(tensor.dtype == torch.float32 for tensor in weights(trainer).values())
        measured.append(trainer.evaluate()["eval_loss"])
    assert measured[0] != measured[1]
    assert measured[0] == pytest.approx(measured[1], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, {"width": 8, "doubt": True}])
def test_a_head_is_fitted_on_kept_hidden_states_without_the_base(
    make: MakeTrainer, shape: dict[str, Any], tiny_model: Tiny, config: Make, tmp_path: Path
) -> None:
    """Its loss is less than after some epochs of AdamW."""
    base = tiny_model(1)
    spec, model = ModelSpec("base"), LanguageModel(base, name="base")
    kept = score_examples(model, EXAMPLES, tmp_path / "kept", spec=spec, hidden_states=True, shard_size=5)
    final = []
    data = TrainingSet(EXAMPLES, [KNOWS_HALF], kept)
    options = {"head_learning_rate": 1e-2, "warm_start": True}
    trainer = make(data, base=base, head=DeferralHead(32, 1, **shape), eval_dataset=data, method="head", **options)
    trainer.train()
    final = [trainer.evaluate(), fit_head(DeferralHead(32, 1, **shape), config(method="head"), data, data)]
    assert final[1]["eval_loss"] < final[0]["eval_loss"]
    assert final[1]["eval_base_nll"] == pytest.approx(final[0]["eval_base_nll"], rel=1e-4)
    with pytest.raises(ConfigError, match="head_learning_rate has no effect here: a head on stored hidden states"):
        fit_head(DeferralHead(32, 1), config(method="head", head_learning_rate=1e-2), data)


def test_kept_hidden_states_are_of_a_frozen_base_only(config: Make, tiny_model: Tiny, tmp_path: Path) -> None:
    model = LanguageModel(tiny_model(1), name="base")
    plain = score_examples(model, EXAMPLES, tmp_path / "plain", spec=ModelSpec("base"))
    with pytest.raises(ConfigError, match="have no hidden states; score it with hidden_states=True"):
        fit_head(DeferralHead(32, 1), config(method="head"), TrainingSet(EXAMPLES, [KNOWS_HALF], plain))
    with pytest.raises(ConfigError, match=r"another kind \(with or without hidden states\)"):
        find_scores(tmp_path / "plain", EXAMPLES, hidden_states=True)
    kept = score_examples(model, EXAMPLES, tmp_path / "kept", spec=ModelSpec("base"), hidden_states=True)
    with pytest.raises(ConfigError, match="require a frozen base, but method 'full' changes it"):
        fit_head(DeferralHead(32, 1), config(method="full"), TrainingSet(EXAMPLES, [KNOWS_HALF], kept))


@pytest.mark.slow
def test_training_stops_early_and_keeps_the_best(make: MakeTrainer, tiny_model: Tiny, tmp_path: Path) -> None:
    options = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 40,
        "load_best_model_at_end": True, "early_stopping_patience": 3, "learning_rate": 0.3, "seed": 5,
    }  # fmt: skip

    def named(name: str, **more: Any) -> CoLLMTrainer:
        return make(base=tiny_model(1), eval_dataset=DATA, **options, output_dir=str(tmp_path / name), **more)

    whole = named("whole")
    whole.train()
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3 < 40
    assert whole.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    with pytest.raises(KeyboardInterrupt):
        named("cut", callbacks=[Kill(best + 2)]).train()
    resumed = named("cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    assert same(weights(resumed), weights(whole))


def test_a_quantized_base_passes_gradients_after_evaluation(saved_model: Saved) -> None:
    """Which bitsandbytes forgets on CPUs with bf16 instructions, unless its weights keep their layout."""
    path = saved_model("base", 1, hidden_size=64, intermediate_size=128)
    model = load_model(ModelSpec(str(path), dtype="float32", device="cpu", quantization="nf4"))
    assert model.get_memory_footprint() < 0.7 * load_model(ModelSpec(str(path))).get_memory_footprint()
    embedded = model.get_input_embeddings()(torch.arange(9).unsqueeze(0)).detach()

    def gradient() -> Tensor:
        leaf = embedded.clone().requires_grad_()
        model(inputs_embeds=leaf).logits.sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    before = gradient()
    with torch.no_grad():
        model(torch.arange(9).unsqueeze(0))
    assert before.abs().sum() > 0
    assert torch.equal(gradient(), before)
