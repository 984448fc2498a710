"""What of vLLM one engine depends on is checked by its name, on modules that stand in for vLLM."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from collm.errors import ConfigError
from collm.vllm.hooks import CALLED, READ, REPLACED, check_hooks

Parts = dict[str, Any]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Classes and functions of a vLLM that has all hooks, by place."""
    modules: dict[str, ModuleType] = {}
    parts: Parts = {}
    for place in {**READ, **CALLED, **REPLACED}:
        module, _, path = place.partition(":")
        for end in range(len(module.split("."))):
            name = ".".join(module.split(".")[: end + 1])
            monkeypatch.setitem(sys.modules, name, modules.setdefault(name, ModuleType(name)))
        owner: Any = modules[module]
        *classes, last = path.split(".")
        for name in classes:
            if not hasattr(owner, name):
                setattr(owner, name, type(name, (), {}))
            owner = getattr(owner, name)
        setattr(owner, last, of_attributes(READ[place]) if place in READ else takes({**CALLED, **REPLACED}[place]))
        parts[place] = owner
    modules["vllm"].__version__ = "0.99"  # type: ignore[attr-defined]
    return parts


def of_attributes(names: str) -> type:
    return dataclasses.make_dataclass("Anything", names.split())


def takes(names: str) -> Any:
    return eval(f"lambda {', '.join(names.split())}: None")


def test_a_vllm_of_any_version_that_has_all_hooks_is_accepted(parts: Parts) -> None:
    check_hooks()
    place = "vllm.v1.outputs:SamplerOutput"
    parts[place].SamplerOutput = takes(f"{CALLED[place]} further=None")
    check_hooks()


@pytest.mark.parametrize("place", {**READ, **CALLED, **REPLACED})
def test_a_missing_hook_is_named(parts: Parts, place: str) -> None:
    delattr(parts[place], place.rpartition(":")[2].rpartition(".")[2])
    with pytest.raises(ConfigError, match=rf"vLLM 0.99 does not have {place}, .* a server for each model"):
        check_hooks()


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample", "self logits"),
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample", "self logits spec_decode_metadata further=None"),
        ("vllm.v1.sample.sampler:Sampler.forward", "self logits metadata"),
        ("vllm.v1.outputs:SamplerOutput", "sampled_token_ids logprobs_tensors required"),
    ],
)
def test_other_parameters_are_named(parts: Parts, place: str, found: str) -> None:
    setattr(parts[place], place.rpartition(":")[2].rpartition(".")[2], takes(found))
    with pytest.raises(ConfigError, match=rf"does not have {place}\(.*\), but parameters \("):
        check_hooks()


def test_a_missing_attribute_is_named(parts: Parts) -> None:
    place = "vllm.v1.worker.gpu_input_batch:InputBatch"
    parts[place].InputBatch = of_attributes(READ[place].replace("generators", "streams"))
    with pytest.raises(ConfigError, match=f"does not have {place}.generators"):
        check_hooks()


def test_the_distribution_for_vllm_holds_what_its_entry_points_name() -> None:
    project = Path(__file__).parents[2] / "plugins" / "vllm" / "pyproject.toml"
    declared = project.read_text(encoding="utf-8")
    (source,) = re.findall(r'^"(.*)" = "collm"$', declared, re.M)
    entry_points = re.findall(r'^collm = "([\w.]+):(\w+)"$', declared, re.M)
    assert len(entry_points) == 2
    for module, name in entry_points:
        path = (project.parent / source).parent.joinpath(*module.split(".")).with_suffix(".py")
        assert re.search(rf"^(def|class) {name}\(", path.read_text(encoding="utf-8"), re.M)
