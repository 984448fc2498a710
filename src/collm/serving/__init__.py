"""An OpenAI-compatible server: one decoding loop per collaboration, shared by all its clients."""
