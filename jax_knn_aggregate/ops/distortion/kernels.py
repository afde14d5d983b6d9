"""The families of the distortion loss and what their kernels are called with; where rays begin.

Two families: rays of equal length, x = (w, m, interval), y = (L,); and rays that lie one after another in flat arrays,
with aux = (offsets,) saying where each begins. The derivation of the running sums and derivatives that the kernels
compute stands in ``csrc/distortion/formulas.h``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from ...core import ffi
from ...core.batch import Shape, fit, over_batch, over_merged_batch
from ...core.family import Family, Operands, Sparse
from ...core.ffi import bits, present
from ...core.primitive import make_primitive
from .reference import dense_reference, flat_reference

Struct = jax.ShapeDtypeStruct
Results = tuple[Struct | None, ...]

# Kernels. One target serves the value and all derivatives of a family: bit masks in its attributes say which tangents
# are there (those of w, m, interval and the loss' cotangent) and which results are wanted, gradients in x and then the
# loss.


def _roles(target: str) -> dict[str, Callable[..., list[jax.Array] | None]]:
    none, call = (None, None, None), functools.partial(_call, target)

    def value(platform: str, batch: Shape, x: Operands, aux: Operands, results: Results) -> Any:
        return call(platform, batch, x, aux, (*none, *results))

    def jvp(platform: str, batch: Shape, x: Operands, aux: Operands, dx: Sparse, results: Results) -> Any:
        return call(platform, batch, x, aux, (*none, *results), v=dx)

    def vjp(platform: str, batch: Shape, x: Operands, aux: Operands, ct: Sparse, results: Results) -> Any:
        return call(platform, batch, x, aux, (*results, None), ct=ct)

    def vjp_vjp(
        platform: str, batch: Shape, x: Operands, aux: Operands, ct: Sparse, v: Sparse, results: Results
    ) -> Any:
        return call(platform, batch, x, aux, results, v=v, ct=ct if present(results[:3]) else (None,))

    def vjp_jvp(
        platform: str, batch: Shape, x: Operands, aux: Operands, ct: Sparse, dx: Sparse, dct: Sparse, results: Results
    ) -> Any:
        # In w alone the gradient is linear, and of ragged rays two calls without dual numbers take less: 0.73 ms for
        # 0.79 of a Hessian times a vector, on an H100.
        if aux and not present(dx[1:], results[1:]):
            return None
        return call(platform, batch, x, aux, (*results, None), v=dx, ct=ct, v_ct=dct)

    return {"value": value, "jvp": jvp, "vjp": vjp, "vjp_vjp": vjp_vjp, "vjp_jvp": vjp_jvp}


def _call(
    target: str,
    platform: str,
    batch: Shape,
    x: Operands,
    aux: Operands,
    results: Results,
    *,
    v: Sparse = (None, None, None),
    ct: Sparse = (None,),
    v_ct: Sparse = (None,),
) -> list[jax.Array] | None:
    """Calls a kernel, which gives results with all batch axes in full, and an interval shared by rays one for each."""
    if not ffi.available(target, platform):
        return None
    rays, shared = tuple(a.shape[-1] - 1 for a in aux), x[2].shape[-1] != x[0].shape[-1]
    given = [
        Struct(batch + (rays if shared and i == 2 else s.shape[len(batch) :]), s.dtype)
        for i, s in enumerate(results)
        if s is not None
    ]
    scratch = []
    if platform == "cuda" and present(results[:2]):
        tiles = x[0].shape[-1] // (ffi.number("cuda.tile_bytes") // x[0].dtype.itemsize)
        scratch = [Struct((*batch, tiles, ffi.number("cuda.right_sums")), x[0].dtype)]
    attributes = {"along": bits((*v, *v_ct)), "want": bits(results), "shared_interval": np.int32(shared)}
    got = ffi.call(target, [*given, *scratch])(*x, *aux, *present(v, ct, v_ct), **attributes)
    out = []
    for a, s in zip(got[: len(given)], present(results), strict=True):
        if a.shape[len(batch) :] != s.shape[len(batch) :]:
            a = a.reshape(*batch, *(rays or (1,))).sum(-1, keepdims=True)
        out.append(fit(a, s.shape))
    return out


DENSE = Family(
    "distortion",
    reference=dense_reference,
    outputs=lambda x, aux: [Struct((), x[0].dtype)],
    x_ndims=(1, 1, 1),
    aux_ndims=(),
    y_ndims=(0,),
    kernels=_roles("distortion"),
)
FLAT = Family(
    "flat_distortion",
    reference=flat_reference,
    outputs=lambda x, aux: [Struct((aux[0].shape[0] - 1,), x[0].dtype)],
    x_ndims=(1, 1, 1),
    aux_ndims=(1,),
    y_ndims=(1,),
    kernels=_roles("flat_distortion"),
)


# Where rays begin.


def _offsets_outputs(ids: Any, *, n_rays: int) -> list[Struct]:
    return [Struct((*ids.shape[:-1], n_rays + 1), jnp.int32)]


def _offsets_reference(ids: jax.Array, *, n_rays: int) -> list[jax.Array]:
    rays = jnp.arange(n_rays + 1, dtype=jnp.int32)

    def one(ids: jax.Array) -> jax.Array:
        if is_symbolic_dim(ids.shape[0]):  # which searchsorted does not take
            counts = jnp.zeros(n_rays + 2, jnp.int32).at[jnp.clip(ids, -1, n_rays) + 1].add(1)
            return jnp.cumsum(counts, dtype=jnp.int32)[:-1]
        return jnp.searchsorted(ids, rays, method="scan_unrolled").astype(jnp.int32)

    return [over_batch(one, [ids], [1])]


def _offsets_kernel(platform: str, *operands: jax.Array, **params: Any) -> list[jax.Array] | None:
    if not ffi.available("ray_offsets", platform):
        return None
    depth, outputs = operands[0].ndim - 1, _offsets_outputs(*operands, **params)
    return over_merged_batch(
        lambda operands, results, _: ffi.call("ray_offsets", results)(*operands), operands, depth, outputs
    )


#: (..., N) ids that do not decrease -> (..., n_rays + 1): ray r has the samples [offsets[r], offsets[r + 1]).
#: Ascending whatever the ids are, so that every sample belongs to one ray or to none.
RAY_OFFSETS = make_primitive(
    "ray_offsets",
    reference=_offsets_reference,
    outputs=_offsets_outputs,
    cores=lambda n_rays: (["."], ["."]),
    kernel=_offsets_kernel,
)
