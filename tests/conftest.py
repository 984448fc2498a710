"""Tiny models and a tokenizer shared by all tests: random, made from configs, saved to disk where a path is needed."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests run at once, and threads that wait for a core spin
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on a CPU; read when Triton is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name of nothing is looked up nowhere

import gc
import logging
import signal
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# torch and transformers are imported where they are needed: the process that hands out tests needs neither.

LONG = (
    "recipes/test_facts_run",
    "vllm/test_engine",
    "training/test_distributed",
    "cli/test_cli",
    "serving/test_playground",
)
# They run on one worker, as starting the process that they fork (tests/processes.py) takes long.
FORKING = (
    "training/test_distributed",
    "cli/test_cli",
    "test_damaged_files",
    "test_first_use",
    "test_run_with_tools",
    "test_trust",
)


class _Schedule(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    def _split_scope(self, nodeid: str) -> str:
        return "forking" if nodeid.startswith(tuple(f"tests/{name}.py" for name in FORKING)) else nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return _Schedule(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, so that all processes end at about the same time."""
    items.sort(key=lambda item: not item.nodeid.startswith(tuple(f"tests/{name}.py" for name in LONG)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws, and what is first made for it, does not depend on the tests before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _process() -> Iterator[None]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes what it runs in the background ignore it
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # Every HTTP client reads all certificates, for 30 ms. No test speaks TLS.
    ssl.SSLContext.load_verify_locations = lambda *_, **__: None  # type: ignore[method-assign]
    yield
    gc.unfreeze()  # libraries that count their objects at the end find none left


@pytest.fixture(autouse=True, scope="module")
def _old_objects_are_not_collected() -> None:
    """Libraries hold so many objects that a collection of all of them takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0..w93 by white space, with <pad>, <eos> and <unk>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.architectures import VOCAB_SIZE

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCAB_SIZE - 3))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Makes a tiny Llama: tiny_model(seed, **config changes)."""
    from tests.tiny_models import make_model, tiny_config

    return lambda seed=0, **changes: make_model(tiny_config(**changes), seed)


@pytest.fixture
def saved_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Saves a tiny Llama with the tokenizer: saved_model(name, seed, **config changes) -> its directory."""
    from tests.tiny_models import make_model, tiny_config

    def save(name: str, seed: int = 0, **changes: Any) -> Path:
        directory = tmp_path / name
        make_model(tiny_config(**changes), seed).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return save


CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte and a few merges, with <eos> and a chat template."""
    from tests.tokenizers import merging_tokenizer

    tokenizer = merging_tokenizer("the cat sat on the mat", vocab_size=264, across_words=False)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="session")
def byte_model(byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A tiny Llama over that tokenizer's ids."""
    from tests.tiny_models import make_model, tiny_config

    sizes = {"intermediate_size": 64, "vocab_size": len(byte_tokenizer)}  # blocks of a GGUF file have 32 weights
    ids = {"eos_token_id": byte_tokenizer.eos_token_id, "pad_token_id": None}
    return make_model(tiny_config(**sizes, **ids), seed=0)


@pytest.fixture(scope="session")
def gguf_path(
    tmp_path_factory: pytest.TempPathFactory, byte_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Both as a GGUF file, its matrices in 8 bits."""
    from collm.models.gguf_export import write_gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_gguf(byte_model, byte_tokenizer, path, "q8_0")
    return path
