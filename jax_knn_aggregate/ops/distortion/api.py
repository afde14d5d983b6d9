"""The distortion loss of rays (Mip-NeRF 360, Barron et al. 2022, eq. 15), in O(N), differentiable to any order.

    L = ⅓ Σ_i interval_i w_i² + Σ_ij w_i w_j |m_i − m_j|

Two families: rays of equal length, x = (w, m, interval), y = (L,); and rays that lie one after another in flat arrays,
with aux = (offsets,) saying where each begins. The derivation of the running sums and derivatives that the kernels
compute stands in ``csrc/distortion/formulas.h``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify
from jax.export import is_symbolic_dim

from . import _checks, _ffi, _sharding
from ._batch import Shape, fit, known, over_batch, over_merged_batch
from ._family import Family, Operands, Sparse
from ._ffi import bits, present
from ._primitive import bind, make_primitive

Struct = jax.ShapeDtypeStruct
Results = tuple[Struct | None, ...]

Array = jax.Array | np.ndarray
Reduction = Literal["mean", "sum", "none"]
Implementation = Literal["xla", "ffi"] | None


def distortion_loss(
    w: Array,
    m: Array,
    interval: Array | float,
    *,
    reduction: Reduction = "mean",
    sort: bool = False,
    check: bool = False,
    implementation: Implementation = None,
) -> jax.Array:
    """The distortion loss of rays of N samples each, which pulls a ray's weights together.

    Differentiable in w, m and interval, to any order, in forward and reverse mode. For w >= 0 and ascending m it is
    never negative, and its accuracy does not depend on where the origin of m is. Where positions are equal, the
    derivative in m is that in which they move apart in the order in which they come.

    Args:
      w: (..., N) weights of samples, float32 or float64; bfloat16 and float16 are computed in float32.
      m: (..., N) positions of samples along their ray, such as midpoints of intervals, ascending and finite; in units
        of length. An infinite one makes the ray's loss NaN, also where its weight is 0: clip the last to the far plane.
      interval: (..., N) widths of the samples' intervals, or a scalar; in units of length. A Python scalar takes the
        dtype of w, also where it has become a tracer.
      reduction: "mean" or "sum" over all rays, or "none".
      sort: whether to sort each ray's samples by m first. Without, m that does not ascend gives a wrong loss.
      check: whether to check that m ascends and is finite, with ``checkify.check``: at once outside ``jit``; inside,
        transform the jitted function with ``jax.experimental.checkify.checkify``.
      implementation: None uses kernels where they exist, "xla" the pure-JAX reference; "ffi" raises
        NotImplementedError where the platform has no kernel.

    Returns:
      A scalar, in units of length; with reduction "none" (...), one value for each ray. Without rays, 0.

    Raises:
      ValueError: for shapes or reduction out of range. TypeError: for dtypes.
    """
    _checks.implementation(implementation)
    w, m, interval = _arrays(w, m, interval, flat=False)
    if sort:
        m, w, interval = lax.sort(_by_position("distortion_loss", w, m, interval), dimension=-1, num_keys=1)
    if check:
        _check(jnp.isfinite(m), "distortion_loss: m must be finite")
        _check(m[..., 1:] >= m[..., :-1], "distortion_loss: m must ascend along its last axis; pass sort=True")
    return _reduced(_DENSE(w, m, interval, implementation=implementation)[0], reduction)


def flatten_distortion_loss(
    w: Array,
    m: Array,
    interval: Array | float,
    ray_id: Array,
    n_rays: int,
    *,
    reduction: Reduction = "mean",
    sort: bool = False,
    check: bool = False,
    implementation: Implementation = None,
) -> jax.Array:
    """As ``distortion_loss``, for rays of any lengths whose samples lie one after another in flat arrays.

    Args:
      w, m: (N,) weights and positions, N < 2³¹; m ascending within each ray.
      interval: (N,) or a scalar.
      ray_id: (N,) integers of any dtype that do not decrease: the ray of each sample. Samples whose ray_id is outside
        [0, n_rays) count nowhere, so arrays may be padded: with n_rays at the end, −1 in front. If ray_id decreases
        somewhere (as to −1 at the end), samples are counted to wrong rays; ``sort`` mends and ``check`` finds that.
      n_rays: the number of rays, a Python integer. Rays without samples have loss 0, and count in the mean.
      sort: whether to sort samples by (ray_id, m) first.
      check: whether to check that ray_id does not decrease, and that m ascends within rays and is finite there, as in
        ``distortion_loss``.
      The others as in ``distortion_loss``.

    Returns:
      A scalar, or with reduction "none" (n_rays,).

    Raises:
      ValueError: for shapes, n_rays or reduction out of range. TypeError: for dtypes.
    """
    _checks.implementation(implementation)
    w, m, interval = _arrays(w, m, interval, flat=True)
    n_rays = _ray_count(n_rays)
    ids = _ray_ids(ray_id, w.shape[0], n_rays)
    if sort:
        ids, m, w, interval = lax.sort((ids, *_by_position("flatten_distortion_loss", w, m, interval)), num_keys=2)
    if check:
        name, outside = "flatten_distortion_loss", (ids < 0) | (ids >= n_rays)
        _check(ids[1:] >= ids[:-1], f"{name}: ray_id must not decrease; pass sort=True")
        _check(outside | jnp.isfinite(m), f"{name}: m must be finite")
        apart = outside[1:] | (ids[1:] != ids[:-1])
        _check(apart | (m[1:] >= m[:-1]), f"{name}: m must ascend within each ray; pass sort=True")
    (offsets,) = bind(_RAY_OFFSETS, ids, n_rays=n_rays, implementation=implementation)
    return _reduced(_FLAT(w, m, interval, offsets, implementation=implementation)[0], reduction)


#: The names that these had in torch_efficient_distloss. There, only ``eff_distloss_native`` had gradients in m and
#: interval and of second order; ``flatten_eff_distloss`` found the number of rays by waiting for the device.
eff_distloss = eff_distloss_native = distortion_loss
flatten_eff_distloss = flatten_distortion_loss


# Arguments.


def _arrays(w: Any, m: Any, interval: Any, *, flat: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three float arguments in one dtype; a scalar interval with an axis of size 1 for each axis of w."""
    w, m = _floats("w", w), _floats("m", m)
    interval = _floats("interval", jnp.asarray(interval, w.dtype) if _is_weak(interval) else interval)
    for name, a in (("m", m), ("interval", interval)):
        if a.dtype != w.dtype:
            raise TypeError(
                f"{name} has dtype {a.dtype}, expected {w.dtype} like w (bfloat16 and float16 count as float32). "
                "Convert one of them with astype."
            )
    expected = "(N,)" if flat else "(..., N)"
    if w.ndim < 1 or (flat and w.ndim != 1):
        raise ValueError(f"w has shape {w.shape}, expected {expected}.")
    if m.shape != w.shape:
        raise ValueError(f"m has shape {m.shape}, expected {w.shape} like w.")
    if interval.shape not in ((), w.shape):
        raise ValueError(f"interval has shape {interval.shape}, expected a scalar or {w.shape} like w.")
    if known(w.shape[-1], 0) >= 2**31:
        raise ValueError(f"w has N = {w.shape[-1]} samples, expected fewer than 2**31. Split it.")
    return w, m, interval.reshape((1,) * w.ndim) if interval.ndim == 0 else interval


def _floats(name: str, a: Any) -> jax.Array:
    """In the dtype that is computed in."""
    a = _checks.as_array(name, a)
    if not jnp.issubdtype(a.dtype, jnp.floating) or a.dtype.itemsize > 8 or a.dtype.itemsize < 2:
        raise TypeError(
            f"{name} has dtype {a.dtype}, expected float32 or float64, bfloat16 or float16. Convert it with astype."
        )
    return a.astype(jnp.float32) if a.dtype.itemsize == 2 else a


def _is_weak(a: Any) -> bool:
    """Whether a is real numbers that take the dtype of what they meet: JAX's weak types, and all scalars of NumPy."""
    if isinstance(a, jax.Array):
        weak = jax.typeof(a).weak_type
    else:
        weak = isinstance(a, int | float | np.generic | np.ndarray) and np.ndim(a) == 0
    return weak and jnp.isdtype(jnp.result_type(a), ("integral", "real floating"))


def _ray_count(n_rays: Any) -> int:
    n_rays = _checks.static_integer("n_rays", n_rays)
    if not 0 <= n_rays < 2**31 - 1:
        raise ValueError(f"n_rays is {n_rays}, expected 0 <= n_rays < 2**31 - 1.")
    return n_rays


def _ray_ids(ray_id: Any, N: int, n_rays: int) -> jax.Array:
    """int32 (N,). Wider integers are cut off on either side of [0, n_rays) before they are narrowed."""
    a = _checks.integers("ray_id", ray_id)
    if a.shape != (N,):
        raise ValueError(f"ray_id has shape {a.shape}, expected {(N,)}, one ray for each sample of w.")
    # int32 ids go to the kernel as they are, which takes any.
    return jnp.asarray(a) if a.dtype == jnp.int32 else _checks.narrowed(a, n_rays, above=n_rays)


def _by_position(name: str, w: jax.Array, m: jax.Array, interval: jax.Array) -> list[jax.Array]:
    """[m, w, interval], all of one shape and split alike, as a sort by m takes them."""
    x = [m, w, jnp.broadcast_to(interval, w.shape)]
    axes = (*(f"b{i}" for i in range(w.ndim - 1)), None)
    return _sharding.agree(name, x, [axes] * 3) if _sharding.typed([jax.typeof(a) for a in x]) else x


def _check(ok: jax.Array, message: str) -> None:
    checkify.check(ok.all(), message)


def _reduced(losses: jax.Array, reduction: str) -> jax.Array:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}, expected one of {', '.join(map(repr, get_args(Reduction)))}.")
    if reduction == "none":
        return losses
    # max of a symbolic size takes them in this order alone.
    return losses.sum() / max(losses.size, 1) if reduction == "mean" else losses.sum()


# The reference.


def _terms(w: jax.Array, m: jax.Array, interval: jax.Array, gap: jax.Array, before: Any, after: Any) -> jax.Array:
    """What each sample adds to L: gap is that to the sample before it, before and after the masses on either side.

    The gap in front of sample i lies between all samples before i and all from i on, whence Σ_i gap_i before_i (w_i +
    after_i) is half the second sum of L. Its derivative in m would be a difference of two such products, and inexact.
    But L is linear in m as long as the order stays: the derivative that belongs there is added with the value 0.
    """
    fixed = lax.stop_gradient
    pairs = fixed(gap) * before * (w + after) + (m - fixed(m)) * w * (before - after)
    return interval * w * w / 3 + 2 * pairs


def _dense_reference(x: Operands, aux: Operands) -> tuple[jax.Array, ...]:
    """w (N,), m (N,), interval (N,) or (1,) -> L ()."""
    w, m, interval = x
    before = jnp.cumsum(jnp.pad(w, (1, 0))[:-1])
    after = jnp.cumsum(jnp.pad(w, (0, 1))[:0:-1])[::-1]
    return (_terms(w, m, interval, jnp.diff(m, prepend=m[:1]), before, after).sum(),)


def _flat_reference(x: Operands, aux: Operands) -> tuple[jax.Array, ...]:
    """w (N,), m (N,), interval (N,) or (1,), offsets (R + 1,) -> L (R,)."""
    (w, m, interval), (offsets,) = x, aux
    N, R = w.shape[0], offsets.shape[0] - 1
    index = jnp.arange(N, dtype=jnp.int32)
    ray = jnp.searchsorted(offsets, index, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    inside = (ray >= 0) & (ray < R)
    w, m = (jnp.where(inside, a, jnp.zeros_like(a)) for a in (w, m))  # a NaN outside stays there
    bounds = jnp.concatenate([offsets[:1] * 0, offsets, offsets[:1] * 0 + N])
    begin, end = bounds[ray + 1], bounds[ray + 2]
    gap = jnp.where(index > begin, m - jnp.pad(m, (1, 0))[:-1], jnp.zeros_like(m))
    before = _sums_before(w, begin)
    after = _sums_before(w[::-1], N - end[::-1])[::-1]
    terms = _terms(w, m, interval, gap, before, after)
    return (jnp.zeros(R + 1, w.dtype).at[jnp.where(inside, ray, R)].add(terms)[:R],)


def _sums_before(x: jax.Array, begin: jax.Array) -> jax.Array:
    """Σ of x[j] over begin[i] <= j < i, for each i, by doubling: no ray's sums meet those of another."""
    N = x.shape[0]
    index = jnp.arange(N, dtype=jnp.int32)

    def back(a: jax.Array, step: Any) -> jax.Array:
        reached = index - step >= begin
        moved = jnp.roll(a, step) if is_symbolic_dim(N) else jnp.pad(a, (step, 0))[:N]
        return jnp.where(reached, moved, jnp.zeros_like(a))

    sums, step = back(x, 1), 1
    if is_symbolic_dim(N):  # as often as the largest N needs
        return lax.fori_loop(0, 31, lambda i, sums: sums + back(sums, jnp.int32(1) << i.astype(jnp.int32)), sums)
    while step < N:
        sums, step = sums + back(sums, step), 2 * step
    return sums


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
    if not _ffi.available(target, platform):
        return None
    rays, shared = tuple(a.shape[-1] - 1 for a in aux), x[2].shape[-1] != x[0].shape[-1]
    given = [
        Struct(batch + (rays if shared and i == 2 else s.shape[len(batch) :]), s.dtype)
        for i, s in enumerate(results)
        if s is not None
    ]
    attributes = {"along": bits((*v, *v_ct)), "want": bits(results), "shared_interval": np.int32(shared)}
    got = _ffi.call(target, given)(*x, *aux, *present(v, ct, v_ct), **attributes)
    out = []
    for a, s in zip(got, present(results), strict=True):
        if a.shape[len(batch) :] != s.shape[len(batch) :]:
            a = a.reshape(*batch, *(rays or (1,))).sum(-1, keepdims=True)
        out.append(fit(a, s.shape))
    return out


_DENSE = Family(
    "distortion",
    reference=_dense_reference,
    outputs=lambda x, aux: [Struct((), x[0].dtype)],
    x_ndims=(1, 1, 1),
    aux_ndims=(),
    y_ndims=(0,),
    kernels=_roles("distortion"),
)
_FLAT = Family(
    "flat_distortion",
    reference=_flat_reference,
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
    if not _ffi.available("ray_offsets", platform):
        return None
    depth, outputs = operands[0].ndim - 1, _offsets_outputs(*operands, **params)
    return over_merged_batch(
        lambda operands, results, _: _ffi.call("ray_offsets", results)(*operands), operands, depth, outputs
    )


#: (..., N) ids that do not decrease -> (..., n_rays + 1): ray r has the samples [offsets[r], offsets[r + 1]).
#: Ascending whatever the ids are, so that every sample belongs to one ray or to none.
_RAY_OFFSETS = make_primitive(
    "ray_offsets",
    reference=_offsets_reference,
    outputs=_offsets_outputs,
    cores=lambda n_rays: (["."], ["."]),
    kernel=_offsets_kernel,
)
