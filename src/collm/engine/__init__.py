"""Requests in, token steps out: the one decoding loop."""
