"""The device's clock: CUPTI's kernels divided into calls, and what takes over when it fails."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfra.measure import device_time, time


class Cupti:
    """A profiler that reports what it is given; notes whether it was left attached."""

    def __init__(self, kernels=(), error=None):
        self.kernels, self.error, self.attached = list(kernels), error, False

    def _cupti_init(self):
        if self.error:
            raise self.error
        self.attached = True

    def _cupti_get_timings(self, finalize):
        assert finalize
        self.attached = False
        return self.kernels


@pytest.fixture
def gpu(monkeypatch):
    """Makes the process believe in a GPU whose profiler is the given one."""

    def pretend(cupti):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(device_time, "_extension", lambda: cupti)
        return cupti

    return pretend


def measured(function=lambda: 0.0):
    return time(function, seconds=1e-9, least=5, most=5, clock=iter(range(10**6)).__next__)


def test_a_cpu_has_none():
    sample = time(jax.jit(lambda x: x + 1), jnp.ones(3), seconds=1e-9)
    assert sample.device == () and sample.device_median is None
    assert sample.device_method == device_time.NONE


def test_kernels_are_summed_by_call(gpu):
    kernels = [kernel for i in range(5) for kernel in (("matmul", 2.0 + i), ("add", 0.5))]
    cupti = gpu(Cupti(kernels))
    sample = measured()
    assert sample.device == pytest.approx([0.0025, 0.0035, 0.0045, 0.0055, 0.0065])
    assert sample.device_median == pytest.approx(0.0045)
    assert sample.device_method == device_time.CUPTI and not cupti.attached


@pytest.mark.parametrize(
    ("cupti", "reason"),
    [
        (Cupti(error=RuntimeError("Failed to execute cuptiSubscribe\nand more")), "cuptiSubscribe"),
        (Cupti(error=MemoryError()), "MemoryError"),
        (Cupti(), "0 kernels"),
        (Cupti([("a", 1.0)] * 7), "7 kernels in 5 calls"),
        (Cupti([("a", 1.0)] * 5 + [("b", 1.0)] * 5), "different kernels"),
        (None, "_cupti_init"),
    ],
    ids=["held", "bare", "silent", "indivisible", "mixed", "absent"],
)
def test_any_failure_falls_to_the_wall_and_says_so(gpu, cupti, reason):
    gpu(cupti)
    sample = measured()
    assert len(sample.device) == 5 and sample.device_median == 1
    assert sample.device_method.startswith("wall of 1 calls") and reason in sample.device_method
    assert "\n" not in sample.device_method and not getattr(cupti, "attached", False)


def test_the_real_binding_is_absent_here_and_that_is_no_error(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "CUPTI: " in measured().device_method


def test_kernels_of_several_devices_are_not_added_up(gpu):
    gpu(Cupti([("a", 1.0)] * 5))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones(8), jax.sharding.NamedSharding(mesh, jax.P("x")))
    assert "8 devices" in measured(lambda: x).device_method


def test_an_error_of_the_function_is_its_own(gpu):
    cupti, left = gpu(Cupti([("a", 1.0)])), iter(range(7))  # warm-up and samples, then it breaks
    with pytest.raises(StopIteration):
        measured(lambda: next(left))
    assert not cupti.attached


def test_inputs_are_made_before_the_clock_and_the_profiler(gpu):
    cupti = gpu(Cupti([("a", 1.0)] * 5))
    made = []

    def fresh():
        while True:
            made.append(cupti.attached)
            yield (0.0,)

    time(lambda x: x, inputs=fresh(), seconds=1e-9, least=5, most=5)
    assert len(made) > 10 and not any(made)


def test_a_tpu_has_batches(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert measured().device_method == "wall of 1 calls queued at once (no kernel clock for tpu)"


def test_a_batch_is_divided_by_its_calls(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    clock = iter(range(10**6)).__next__  # one second from look to look
    sample = time(lambda: 0.0, seconds=1e-9, least=50, clock=clock)
    assert sample.device == (0.1,) * 5 and "wall of 10 calls" in sample.device_method


def test_no_device_time_where_none_is_asked_for(gpu):
    gpu(Cupti([("a", 1.0)] * 5))
    assert time(lambda: 0.0, seconds=0).device == ()
    assert time(lambda: 0.0, seconds=1e-9, device=False).device == ()
