"""SmolLM2-135M-Instruct is what it is in transformers: logits, and 64 greedy tokens of ten prompts.

Both load the same GGUF, dequantised to float32. Needs the model (`jaxinfra pull smollm2-135m`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.errors import UserError
from jaxinfra.generate import generate
from jaxinfra.model import cache as kv
from jaxinfra.text import Tokenizer
from jaxinfra.weights.open import load_weights
from jaxinfra.weights.pull import pull

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [pytest.mark.live, pytest.mark.network, pytest.mark.slow]

NEW = 64
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain what a compiler does to a ten-year-old.",
    "def fibonacci(n):",
    "Once upon a time, in a valley far away,",
    "List three uses of copper and one of zinc.",
    "Übersetze ins Englische: Der Fluss war gefroren.",
    "1, 1, 2, 3, 5, 8,",
    "Why does the moon always show the same face?",
    "The three laws of thermodynamics say that",
]


@pytest.fixture(scope="module")
def prompts_and_models():
    """(token ids of each prompt, our config and parameters, transformers' model)."""
    try:
        path = pull("smollm2-135m", progress=False)
    except UserError as error:
        pytest.skip(str(error))
    if path.is_dir():
        path = next(path.glob("*.gguf"), path)
    if path.is_dir():
        pytest.skip("the pulled model is not a GGUF")
    config, params = load_weights(path, jnp.float32)
    tokenizer = Tokenizer.from_gguf(path)
    ids = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in PROMPTS[::2]]
    ids += [tokenizer.encode(text) for text in PROMPTS[1::2]]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    model.generation_config.eos_token_id = None
    return ids, config, kv.unstack(params, config), model.eval()


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
def test_logits_with_a_chats_template_and_without(prompts_and_models):
    ids, config, params, model = prompts_and_models

    @jax.jit
    def logits(params, tokens):
        held = kv.empty(config, *tokens.shape)
        return kv.head(params, config, kv.extend(params, config, tokens, held, fresh=True)[0])

    for prompt in (ids[0], ids[5]):
        with torch.no_grad():
            wanted = model(torch.tensor([prompt])).logits[0].numpy()
        found = np.asarray(logits(params, np.array([prompt], np.int32)))[0]
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
def test_64_greedy_tokens_of_ten_prompts(prompts_and_models):
    ids, config, params, model = prompts_and_models
    together = generate(params, config, ids, max_new_tokens=NEW).tokens
    for i, prompt in enumerate(ids):
        row = torch.tensor([prompt])
        out = model.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=NEW,
            cache_implementation="static",
        )  # fmt: skip
        wanted = out[0, len(prompt) :].tolist()
        assert together[i] == wanted, f"prompt {i} in a batch of ten"
        if i in (0, 5):  # with a chat's template and without
            alone = generate(params, config, [prompt], max_new_tokens=NEW).tokens[0]
            assert alone == wanted, f"prompt {i} alone"
