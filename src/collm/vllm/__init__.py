"""Collaborations across vLLM servers. Names here are also read inside vLLM, so this file imports nothing."""

NOTE = "collm_vllm.json"
"""File beside an exported base that says which rows of its output layer mean whom."""

NOTE_FORMAT = 1

ROW_SCALE = 0.125
"""What rows hold of a defer logit, less its bias: a row at its full size would drown the tokens in the normaliser that
a server's log-probabilities share. A power of two, so nothing is rounded."""

THRESHOLD = "defer_threshold"
"""Key of a request's `vllm_xargs`: the base defers where its defer prob exceeds this."""
