"""Strict JAX settings, several CPU devices, fresh random inputs, and the implementations that this machine has.

Environment:
  JAX_KNN_AGGREGATE_TEST_SEED: seed of all random inputs; random if unset, and printed in the header.
  JAX_KNN_AGGREGATE_REQUIRE_KERNELS: "cpu" or "cuda"; the run fails at once where that platform lacks a kernel, and
    test_toy.py where there is no compiler for its kernel.
"""

import os
import random
import zlib

_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
SEED = int(os.environ.setdefault("JAX_KNN_AGGREGATE_TEST_SEED", str(random.SystemRandom().randrange(2**32))))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

pytest.register_assert_rewrite("helpers")

from helpers import PLATFORM, REQUIRED  # noqa: E402

from jax_knn_aggregate.core import ffi  # noqa: E402


def _implementations(platform: str) -> list[str]:
    # "ffi", not None: it raises where a kernel is missing, so that a test of the kernels tests no reference.
    return ["xla", "ffi"] if ffi.TARGETS.get(platform) else ["xla"]


def pytest_configure(config):
    required = os.environ.get("JAX_KNN_AGGREGATE_REQUIRE_KERNELS")
    if not required:
        return
    if required not in ffi._REGISTRY_PLATFORM:
        raise pytest.UsageError(f"JAX_KNN_AGGREGATE_REQUIRE_KERNELS is {required!r}, expected 'cpu' or 'cuda'.")
    missing = REQUIRED - ffi.TARGETS.get(required, frozenset())
    if missing:
        raise pytest.UsageError(f"Kernels for {required} are required, but these are not registered: {sorted(missing)}")
    if required == "cuda" and required != PLATFORM:
        raise pytest.UsageError(f"Kernels for cuda are required, but JAX's default platform is {PLATFORM}.")


def pytest_report_header(config):
    kernels = {platform: len(names) for platform, names in ffi.TARGETS.items()}
    return (
        f"JAX_KNN_AGGREGATE_TEST_SEED={SEED}, jax {jax.__version__} on {PLATFORM}, "
        f"implementations {_implementations(PLATFORM)}, kernels registered {kernels or 'none'}"
    )


def _ours(path) -> bool:
    return not path.name.startswith("test_sdf")  # the trainer runs under its users' settings


def pytest_collection_modifyitems(items):
    for item in items:
        if _ours(item.path):
            item.add_marker(pytest.mark.filterwarnings("error"))


def pytest_generate_tests(metafunc):
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", _implementations(PLATFORM))
    if "cpu_implementation" in metafunc.fixturenames:
        metafunc.parametrize("cpu_implementation", _implementations("cpu"))


@pytest.fixture(autouse=True)
def _strict(request):
    if not _ours(request.path):
        yield
        return
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def rng(request):
    """Random numbers of this test alone: the seed repeats it, whichever other tests run."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.name.encode())])


@pytest.fixture
def kernels():
    """Skips a test about kernels on a platform for which none were built; returns the platform."""
    if not ffi.TARGETS.get(PLATFORM):
        pytest.skip(f"no kernels for {PLATFORM} were built")
    return PLATFORM


def _cpu_devices(n):
    devices = jax.devices("cpu")
    if len(devices) < n:
        pytest.skip(f"needs {n} CPU devices, found {len(devices)}: XLA_FLAGS was set without {_DEVICES}")
    return devices[:n]


@pytest.fixture
def cpu_devices():
    """Four CPU devices, also where the default device is a GPU."""
    return _cpu_devices(4)


@pytest.fixture
def eight_cpu_devices():
    return _cpu_devices(8)
