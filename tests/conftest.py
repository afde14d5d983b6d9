"""Strict JAX settings, several CPU devices, fresh random inputs, the implementations that this machine has; two tiers.

Tiers:
  pytest: what is not marked thorough, compiled quickly, but for what is compiled by helpers.user_jit.
  pytest -m "": everything, compiled as users compile it.
``@pytest.mark.thorough_if(name=value, ...)`` marks as thorough what has all of these parameters, of which a list gives
several values; without parameters, the whole test. Several such marks are alternatives.

Environment:
  JAX_KNN_AGGREGATE_TEST_SEED: seed of all random inputs; random if unset, and printed in the header.
  JAX_KNN_AGGREGATE_REQUIRE_KERNELS: "cpu" or "cuda"; the run fails at once where that platform lacks a kernel, and
    test_toy.py where there is no compiler for its kernel.
"""

import os
import random
import re
import subprocess
import sys
import zlib

_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
SEED = int(os.environ.setdefault("JAX_KNN_AGGREGATE_TEST_SEED", str(random.SystemRandom().randrange(2**32))))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import AxisType  # noqa: E402

pytest.register_assert_rewrite("helpers")

from jax_knn_aggregate.core import ffi  # noqa: E402

DEFAULT_TIER = "not thorough"  # pyproject.toml passes it as -m
#: Flags by which XLA compiles several times as fast for the CPU. It drops flags between versions.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
)


def _quick_flags():
    """Those of QUICK that this XLA knows, if it compiles for the CPU: it aborts its process at others."""
    flags = list(QUICK)
    while flags:
        env = {**os.environ, "XLA_FLAGS": " ".join([os.environ["XLA_FLAGS"], *flags])}
        command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode == 0:
            return flags if done.stdout.split()[-1:] == ["cpu"] else []
        unknown = re.findall(r"--\w+", "".join(re.findall("Unknown flags? in XLA_FLAGS: (.*)", done.stderr)))
        flags, before = [flag for flag in flags if flag.split("=")[0] not in unknown], flags
        if flags == before:
            return []
    return []


def _platform():
    """JAX's default platform: asked for late, because JAX reads XLA_FLAGS then."""
    from helpers import PLATFORM

    return PLATFORM


#: Tests of float64, of which the perceptron has no kernels on CUDA.
OF_DOUBLES = ("test_mlp_transforms.py", "test_mlp_edges.py", "test_tcnn.py")


def _implementations(platform: str, file: str = "") -> list[str]:
    # "ffi", not None: it raises where a kernel is missing, so that a test of the kernels tests no reference.
    return ["xla", "ffi"] if ffi.TARGETS.get(platform) and not (platform == "cuda" and file in OF_DOUBLES) else ["xla"]


def pytest_configure(config):
    for line in (
        "thorough: runs with pytest -m '' alone",
        "thorough_if(**parameters): thorough where the parameters are these",
    ):
        config.addinivalue_line("markers", line)
    if config.option.markexpr == DEFAULT_TIER and not hasattr(config, "workerinput"):  # workers inherit it
        os.environ["XLA_FLAGS"] = " ".join([os.environ["XLA_FLAGS"], *_quick_flags()])
    _check_kernels()


def _check_kernels():
    required = os.environ.get("JAX_KNN_AGGREGATE_REQUIRE_KERNELS")
    if not required:
        return
    if required not in ffi._REGISTRY_PLATFORM:
        raise pytest.UsageError(f"JAX_KNN_AGGREGATE_REQUIRE_KERNELS is {required!r}, expected 'cpu' or 'cuda'.")
    from helpers import PLATFORM, REQUIRED

    missing = REQUIRED - ffi.TARGETS.get(required, frozenset())
    if missing:
        raise pytest.UsageError(f"Kernels for {required} are required, but these are not registered: {sorted(missing)}")
    if required == "cuda" and required != PLATFORM:
        raise pytest.UsageError(f"Kernels for cuda are required, but JAX's default platform is {PLATFORM}.")


def pytest_report_header(config):
    kernels = {platform: len(names) for platform, names in ffi.TARGETS.items()}
    quick = "quickly" if QUICK[0] in os.environ["XLA_FLAGS"] else "as by default"
    return (
        f"JAX_KNN_AGGREGATE_TEST_SEED={SEED}, jax {jax.__version__} on {_platform()}, compiling {quick}, "
        f"implementations {_implementations(_platform())}, kernels registered {kernels or 'none'}"
    )


def _ours(path) -> bool:
    return not path.name.startswith("test_sdf")  # the trainer runs under its users' settings


def _thorough(item):
    """Whether all parameters of one of its marks are the item's."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}

    def holds(name, values):
        values = values if isinstance(values, list) else [values]
        return any(parameters[name] == value for value in values)

    marks = [mark.kwargs for mark in item.iter_markers("thorough_if")]
    if not ffi.TARGETS:  # without kernels, the reference is all there is
        marks = [mark for mark in marks if not any(isinstance(v, str) and v == "xla" for v in mark.values())]
    return any(all(holds(name, values) for name, values in mark.items()) for mark in marks)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items):
    for item in items:
        if _thorough(item):
            item.add_marker(pytest.mark.thorough)
        if _ours(item.path):
            item.add_marker(pytest.mark.filterwarnings("error"))


def pytest_generate_tests(metafunc):
    file = metafunc.definition.path.name
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", _implementations(_platform(), file))
    if "cpu_implementation" in metafunc.fixturenames:
        metafunc.parametrize("cpu_implementation", _implementations("cpu", file))


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
def kernels(request):
    """Skips a test about kernels on a platform for which none were built; returns the platform."""
    platform = _platform()
    if "ffi" not in _implementations(platform, request.path.name):
        pytest.skip(f"no kernels for {platform} were built")
    return platform


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


@pytest.fixture(params=(AxisType.Auto, AxisType.Explicit), ids=lambda kind: kind.name)
def mesh(request, eight_cpu_devices):
    jax.config.update("jax_enable_x64", True)  # XLA asks for the program of one shard in a thread of its own
    yield jax.make_mesh((4, 2), ("a", "b"), axis_types=(request.param,) * 2, devices=eight_cpu_devices)
    jax.config.update("jax_enable_x64", False)
