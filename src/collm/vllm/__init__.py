"""Collaborations across vLLM servers. Names here are also read inside vLLM, so this file imports nothing."""

NOTE = "collm_vllm.json"
"""File beside an exported base that says which rows of its output layer mean whom."""

NOTE_FORMAT = 1

THRESHOLD = "defer_threshold"
"""Key of a request's `vllm_xargs`: the base defers where its defer prob exceeds this."""
