"""One decoder-only transformer for every supported family."""
