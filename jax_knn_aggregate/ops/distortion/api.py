"""The distortion loss of rays (Mip-NeRF 360, Barron et al. 2022, eq. 15): the public functions.

    L = ⅓ Σ_i interval_i w_i² + Σ_ij w_i w_j |m_i − m_j|

In O(N), differentiable to any order.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify

from ...core import checks, sharding
from ...core.batch import known
from ...core.checks import Array, Implementation
from ...core.primitive import bind
from .kernels import DENSE, FLAT, RAY_OFFSETS

Reduction = Literal["mean", "sum", "none"]


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
    checks.implementation(implementation)
    w, m, interval = _arrays(w, m, interval, flat=False)
    if sort:
        m, w, interval = lax.sort(_by_position("distortion_loss", w, m, interval), dimension=-1, num_keys=1)
    if check:
        _check(jnp.isfinite(m), "distortion_loss: m must be finite")
        _check(m[..., 1:] >= m[..., :-1], "distortion_loss: m must ascend along its last axis; pass sort=True")
    return _reduced(DENSE(w, m, interval, implementation=implementation)[0], reduction)


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
    checks.implementation(implementation)
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
    (offsets,) = bind(RAY_OFFSETS, ids, n_rays=n_rays, implementation=implementation)
    return _reduced(FLAT(w, m, interval, offsets, implementation=implementation)[0], reduction)


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
    a = checks.as_array(name, a)
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
    n_rays = checks.static_integer("n_rays", n_rays)
    if not 0 <= n_rays < 2**31 - 1:
        raise ValueError(f"n_rays is {n_rays}, expected 0 <= n_rays < 2**31 - 1.")
    return n_rays


def _ray_ids(ray_id: Any, N: int, n_rays: int) -> jax.Array:
    """int32 (N,). Wider integers are cut off on either side of [0, n_rays) before they are narrowed."""
    a = checks.integers("ray_id", ray_id)
    if a.shape != (N,):
        raise ValueError(f"ray_id has shape {a.shape}, expected {(N,)}, one ray for each sample of w.")
    # int32 ids go to the kernel as they are, which takes any.
    return jnp.asarray(a) if a.dtype == jnp.int32 else checks.narrowed(a, n_rays, above=n_rays)


def _by_position(name: str, w: jax.Array, m: jax.Array, interval: jax.Array) -> list[jax.Array]:
    """[m, w, interval], all of one shape and split alike, as a sort by m takes them."""
    x = [m, w, jnp.broadcast_to(interval, w.shape)]
    axes = (*(f"b{i}" for i in range(w.ndim - 1)), None)
    return sharding.agree(name, x, [axes] * 3) if sharding.typed([jax.typeof(a) for a in x]) else x


def _check(ok: jax.Array, message: str) -> None:
    checkify.check(ok.all(), message)


def _reduced(losses: jax.Array, reduction: str) -> jax.Array:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}, expected one of {', '.join(map(repr, get_args(Reduction)))}.")
    if reduction == "none":
        return losses
    # max of a symbolic size takes them in this order alone.
    return losses.sum() / max(losses.size, 1) if reduction == "mean" else losses.sum()
