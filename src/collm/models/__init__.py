"""Models: loading, compatibility checks, templates, KV slots and runners. Only this package uses model internals."""
