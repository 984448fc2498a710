"""The only room that touches a model's insides: loading, guards, KV slots, runners."""
