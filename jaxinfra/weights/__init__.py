"""Checkpoints: fetched, read into `Params`, written. Importing this alone imports no jax.

    from jaxinfra.weights.pull import pull  # a name to a local folder or file
    from jaxinfra.weights.open import load_weights, read_config  # any kind of checkpoint

Kinds: Hugging Face folders of safetensors (`.safetensors`: load, save), GGUF files (`.gguf`: load),
Orbax folders (`.orbax`: load, save).
"""
