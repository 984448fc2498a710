"""A tool that never answers."""

from __future__ import annotations


def silent(text: str) -> str | None:
    return None
