"""The engine's loads by transformers' continuous batching: the peer of `benchmarks.engine_gpu`.

    python -m benchmarks.engine_gpu_peer workload tiny       # a try, one turn; needs a GPU

Pages, CUDA graphs and an asynchronous loop are what transformers chooses; attention is its paged
SDPA where flash-attn is not installed. Every request has its own number of new tokens, no EOS.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.engine_gpu import CONFIG, asked
from benchmarks.turns import answer


@contextmanager
def theirs(load: str) -> Iterator[Callable[[list[tuple[list[int], int]]], dict[str, float]]]:
    """A function that does one turn of requests: its tokens/s. What ends stops its thread."""
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=CONFIG.vocab_size, hidden_size=CONFIG.d_model, head_dim=CONFIG.head_dim,
        intermediate_size=CONFIG.d_ff, num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads, num_key_value_heads=CONFIG.num_kv_heads,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="paged|sdpa"
        ).eval()
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 0}
    generation = transformers.GenerationConfig(
        max_new_tokens=1024, eos_token_id=-1, pad_token_id=0,
        **(sampling if load == "workload" else {"do_sample": False}),
    )  # fmt: skip
    batching = transformers.ContinuousBatchingConfig(
        max_memory_percent=0.3, allow_block_sharing=False
    )
    manager = model.init_continuous_batching(
        generation_config=generation, continuous_batching_config=batching
    )
    manager.start()

    def turn(requests: list[tuple[list[int], int]]) -> dict[str, float]:
        start = time.perf_counter()
        for prompt, tokens in requests:
            manager.add_request(prompt, max_new_tokens=tokens, eos_token_id=-1)
        count, ended = 0, 0
        while ended < len(requests):
            result = manager.get_result(timeout=5)
            if result is None and not manager.is_running():
                raise RuntimeError("transformers' batching thread ended")
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                count, ended = count + len(result.generated_tokens), ended + 1
        seconds = time.perf_counter() - start
        if count != sum(tokens for _, tokens in requests):
            raise RuntimeError(f"{count} tokens")
        return {"rate": count / seconds}

    try:
        yield turn
    finally:
        manager.stop(hard_stop=True)


if __name__ == "__main__":
    load = sys.argv[1]
    few = [(prompt, 16) for prompt, _ in asked(load)[:4]]
    with theirs(load) as turn:
        print(turn(few), file=sys.stderr)  # compiles and captures
        if sys.argv[2:] != ["tiny"]:
            answer(lambda: turn(asked(load)))
