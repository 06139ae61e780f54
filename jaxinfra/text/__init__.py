"""Words: tokenizers from `tokenizer.json` or GGUF metadata, and chat templates in a sandbox."""

from jaxinfra.text.chat import render
from jaxinfra.text.stream import Stream
from jaxinfra.text.tokenizer import Tokenizer

__all__ = ["Stream", "Tokenizer", "render"]
