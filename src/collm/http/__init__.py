"""Calls to OpenAI-compatible servers."""
