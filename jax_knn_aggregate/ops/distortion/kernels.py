"""The families of the distortion loss and what their kernels are called with; where rays begin.

Two families: rays of equal length, x = (w, m, interval), y = (L,); and rays that lie one after another in flat arrays,
with aux = (offsets,) saying where each begins. The derivation of the running sums and derivatives that the kernels
compute stands in ``csrc/distortion/formulas.h``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from ...core import ffi
from ...core.batch import Shape, over_batch, over_merged_batch
from ...core.family import Family, Operands
from ...core.ffi import present
from ...core.one_target import Group, Kernel, one_target
from ...core.primitive import make_primitive
from .reference import dense_reference, flat_reference

Struct = jax.ShapeDtypeStruct


def _has_shared_interval(x: Operands) -> bool:
    return x[2].shape[-1] != x[0].shape[-1]


def _attributes(x: Operands, aux: Operands) -> dict[str, Any]:
    return {"shared_interval": np.int32(_has_shared_interval(x))}


def _by_ray(x: Operands, aux: Operands) -> dict[int, Shape]:
    """The gradient in an interval that rays share, a part of each ray."""
    return {2: (aux[0].shape[-1] - 1,)} if _has_shared_interval(x) else {}


def _scratch(platform: str, batch: Shape, x: Operands, results: Group) -> list[Struct]:
    """On CUDA, for gradients in w and m: of each tile of a long ray, the sums over what is to the right."""
    if platform != "cuda" or not present(results[:2]):
        return []
    tiles = x[0].shape[-1] // (ffi.number("cuda.tile_bytes") // x[0].dtype.itemsize)
    return [Struct((*batch, tiles, ffi.number("cuda.right_sums")), x[0].dtype)]


def _flat_kernels() -> dict[str, Kernel]:
    roles = one_target("flat_distortion", x=3, y=1, attributes=_attributes, parts=_by_ray, scratch=_scratch)

    def vjp_jvp(p: str, batch: Shape, x: Operands, aux: Operands, ct: Any, dx: Any, dct: Any, x_bar: Any) -> Any:
        # In w alone the gradient is linear, and two calls without dual numbers take less: 0.73 ms for 0.79 of a Hessian
        # times a vector, on an H100.
        linear = not present(dx[1:], x_bar[1:])
        return None if linear else roles["vjp_jvp"](p, batch, x, aux, ct, dx, dct, x_bar)

    return {**roles, "vjp_jvp": vjp_jvp}


DENSE = Family(
    "distortion",
    reference=dense_reference,
    outputs=lambda x, aux: [Struct((), x[0].dtype)],
    x_ndims=(1, 1, 1),
    aux_ndims=(),
    y_ndims=(0,),
    kernels=one_target("distortion", x=3, y=1, attributes=_attributes, scratch=_scratch),
)
FLAT = Family(
    "flat_distortion",
    reference=flat_reference,
    outputs=lambda x, aux: [Struct((aux[0].shape[0] - 1,), x[0].dtype)],
    x_ndims=(1, 1, 1),
    aux_ndims=(1,),
    y_ndims=(1,),
    kernels=_flat_kernels(),
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
