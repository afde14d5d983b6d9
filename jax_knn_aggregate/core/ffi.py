"""Loads the extension module and registers its FFI targets. The only module that knows how a target is called."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np

PREFIX = "jax_knn_aggregate."
#: JAX's name of a platform in lowerings -> the name under which its FFI registry files targets (capitals matter).
_REGISTRY_PLATFORM = {"cpu": "cpu", "cuda": "CUDA"}


def _runtime_api_version() -> tuple[int, int] | None:
    """The FFI version that the installed jaxlib supports, from the headers that it ships."""
    header = pathlib.Path(jaxlib.__file__).parent / "include" / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text()
    except OSError:
        return None
    found = {k: re.search(rf"#define XLA_FFI_API_{k} (\d+)", text) for k in ("MAJOR", "MINOR")}
    if not (found["MAJOR"] and found["MINOR"]):
        return None
    return int(found["MAJOR"].group(1)), int(found["MINOR"].group(1))


def check_api_version(built: tuple[int, int], runtime: tuple[int, int] | None) -> None:
    """Raises ImportError where jaxlib would reject handlers built against FFI version ``built``.

    Registering them all the same would make every backend of JAX fail to initialise, not just this package.
    """
    if runtime is not None and (built[0] != runtime[0] or built[1] > runtime[1]):
        raise ImportError(
            f"jax_knn_aggregate was built against XLA FFI version {built[0]}.{built[1]}, but jaxlib "
            f"{jaxlib.__version__} supports up to {runtime[0]}.{runtime[1]}. Reinstall it with build isolation "
            "(pip install --force-reinstall --no-deps .), which builds against the oldest supported jaxlib, "
            "or upgrade jaxlib."
        )


def _extension() -> Any:
    try:
        from .. import _ext
    except ImportError as error:
        here = pathlib.Path(__file__).parent.parent
        if list(here.glob("_ext*.so")):
            raise
        raise ImportError(
            f"jax_knn_aggregate in {here} has no extension module: it is a source tree, not an installed package. "
            "Install it (pip install .) and start Python elsewhere, or with -P, so that the installed one is found."
        ) from error
    return _ext


#: For each platform, the targets that have kernels there (without prefix).
TARGETS: dict[str, frozenset[str]] = {}


def register(platform: str, handlers: Mapping[str, Any]) -> None:
    """Makes targets known to XLA and to ``available``: FFI handlers, as capsules, by name without prefix.

    For handlers of other libraries, the toy op of tests/core/toy for one, and for the extension's own. They must be
    compiled against headers of a jaxlib that is not newer than the installed one (``check_api_version``).
    """
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(PREFIX + name, handler, platform=_REGISTRY_PLATFORM[platform])
    TARGETS[platform] = TARGETS.get(platform, frozenset()) | frozenset(handlers)


def _register_extension() -> None:
    _ext = _extension()
    check_api_version(_ext.ffi_api_version(), _runtime_api_version())
    for platform, handlers in _ext.registrations().items():
        register(platform, handlers)


_register_extension()
_NUMBERS: dict[str, int] = _extension().numbers()
#: Names of all custom-call targets of the extension, for the safety checks of ``jax.export``.
FFI_TARGETS: tuple[str, ...] = tuple(sorted({PREFIX + name for names in TARGETS.values() for name in names}))


def available(target: str, platform: str) -> bool:
    return target in TARGETS.get(platform, frozenset())


def call(target: str, results: Sequence[jax.ShapeDtypeStruct], **attributes: Any) -> Callable[..., Sequence[jax.Array]]:
    """A function of arrays that calls ``target``; attributes are NumPy scalars of the exact type the kernel expects."""
    return functools.partial(jax.ffi.ffi_call(PREFIX + target, list(results)), **attributes)


def bits(values: Iterable[Any]) -> np.int64:
    """An attribute that says which of ``values`` are not None: bit i for the i-th (Bit of csrc/common/bind.h)."""
    there = [v is not None for v in values]
    if len(there) > 63:
        raise ValueError(f"{len(there)} operands or results for one mask of a kernel call, which has bits for 63.")
    return np.int64(sum(1 << i for i, v in enumerate(there) if v))


def present(*groups: Iterable[Any]) -> list[Any]:
    """Those of all groups' values that are not None."""
    return [a for group in groups for a in group if a is not None]


def number(name: str) -> int:
    """A size, limit or layout of the kernels, as ``csrc/module.cc`` names it."""
    return _NUMBERS[name]


def mlp_cuda_scratch_bytes(widths: Sequence[int], item: int, sum_entries: int) -> int:
    """What kernels of the perceptron want to write to behind their results (csrc/mlp/mlp.h)."""
    return _extension().mlp_cuda_scratch_bytes(list(widths), item, sum_entries)


def mlp_cuda_serves(widths: Sequence[int], item: int) -> bool:
    """Whether kernels of the perceptron have room for these widths on the machine's GPU (csrc/mlp/cuda.h)."""
    return _extension().mlp_cuda_serves(list(widths), item)


def filter_error() -> tuple[float, float]:
    """The error bound of the search by tensor cores: relative, and absolute. For its test."""
    return _extension().filter_error()


def build_info() -> dict[str, Any]:
    """How the extension was built, for ``jax-knn-aggregate doctor``."""
    return dict(_extension().build_info())
