"""One machine for derivatives: an op and its derivatives to any order, from one reference formula and a few kernels.

A *family* is six primitives around a pure-JAX function ``reference(x, aux) -> y``, where ``x`` is a tuple of
differentiable operands, ``aux`` a tuple of integer operands and ``y`` a tuple of float results. With J the Jacobian of
the reference at x:

    value    (x, aux)           -> y
    jvp      (x, aux, dx)       -> dy = J dx
    vjp      (x, aux, ct)       -> x_bar = Jᵀ ct                         the transpose of jvp
    jvp_jvp  (x, aux, v, dx, dv)   -> d(J v) along (dx, dv)              the JVP of jvp
    vjp_jvp  (x, aux, ct, dx, dct) -> d(x_bar) along (dx, dct)           the JVP of vjp
    vjp_vjp  (x, aux, ct, v)    -> the gradient of ⟨ct, J(x) v⟩ = ⟨v, Jᵀ ct⟩ in x and in ct
                                                                         the transpose of jvp_jvp and vjp_jvp

All but jvp_jvp may have kernels. Where vjp_jvp has none of its own, those of vjp_vjp and vjp serve: the Hessian of
⟨ct, y⟩ is symmetric, so that Jᵀ ct changes along dx by the gradient of ⟨ct, J(x) dx⟩, which vjp_vjp computes. That is
first and second order in every mix of modes but forward over forward. Whatever has no kernel (that, orders beyond the
second, platforms without) runs the reference, so that no term is ever missing. An Eikonal step, d/d(all) of a loss on
∇_q, executes value, vjp, vjp_vjp, vjp; with ∇_q taken forward, jvp instead of the first vjp.

Static masks over x and y say which operands carry a tangent (or a cotangent) and which results are wanted. Symbolic
zeros are dropped by these masks, never instantiated: a kernel computes what is asked for and nothing else.

This module knows no op: nothing of neighbours or Gaussians.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from .batch import Shape, batch_shape, fit, over_batch, over_merged_batch
from .primitive import bind, make_primitive
from .sharding import left_to_partitioner

Mask = tuple[bool, ...]
#: For each wanted result and each batch axis: whether the result keeps the axis (True) or sums over it (False).
Keep = tuple[Mask, ...]
Operands = tuple[jax.Array, ...]
Structs = tuple[jax.ShapeDtypeStruct, ...]
#: As many entries as the family has operands (or results), None where the mask is False.
Sparse = tuple[jax.Array | None, ...]


def _is_zero(t: Any) -> bool:
    return type(t) is ad.Zero


def _pick(values: Iterable[Any], mask: Mask) -> list[Any]:
    return [v for v, m in zip(values, mask, strict=True) if m]


def _spread(values: Iterable[Any], mask: Mask) -> tuple[Any, ...]:
    """The inverse of ``_pick``: None where the mask is False."""
    it = iter(values)
    return tuple(next(it) if m else None for m in mask)


def _nonzero(values: Iterable[Any]) -> Mask:
    return tuple(not _is_zero(v) for v in values)


def _nonzero_present(values: Iterable[Any]) -> Mask:
    return tuple(v is not None and not _is_zero(v) for v in values)


class Family:
    """The six primitives of one op. Call it as ``family(*x, *aux, implementation=...)``.

    Args:
      name: prefix of the primitives' names.
      reference: ``reference(x, aux) -> y`` for core axes alone, in pure JAX, differentiable to any order.
      outputs: ``outputs(x, aux)``, shapes and dtypes of y for core axes alone: what tracing the reference finds.
      x_ndims, aux_ndims: number of core axes of each operand; all axes before them are batch axes (see ``batch.py``).
      y_ndims: number of core axes of each result. Results have every batch axis in full.
      items: positions in x, aux and y of those whose first core axis counts independent items (queries), all the same:
        devices may each have some of the items (see ``sharding.py``). All other core axes every device needs whole.
      linear: positions in x and y of operands and results whose tangents and cotangents, where there are none, kernels
        leave out. All others count as zeros then. That matters where they meet what is not finite, and holds for the
        reference as well.
      kernels: FFI paths by role ("value", "jvp", "vjp", "vjp_vjp", "vjp_jvp"), see below; any may be missing.

    A kernel is ``kernel(platform, batch, x, aux, ..., results) -> list of arrays, or None`` where it cannot serve.
    ``batch`` is the full size of the batch axes, which come merged; a result of size 1 along one is summed over it.
    Between aux and results stand, for "jvp": dx; for "vjp": ct; for "vjp_vjp": ct, v; for "vjp_jvp": ct, dx, dct; each
    with None where it is zero. ``results`` holds the wanted results' shapes and dtypes, with None for what is not
    wanted: y for "value" and "jvp", x_bar for "vjp" and "vjp_jvp", x_bar + ct_bar for "vjp_vjp". Where one FFI target
    serves all roles, ``one_target.py`` makes these functions.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[[Operands, Operands], tuple[jax.Array, ...]],
        outputs: Callable[[Structs, Structs], Sequence[jax.ShapeDtypeStruct]],
        x_ndims: Sequence[int],
        aux_ndims: Sequence[int],
        y_ndims: Sequence[int],
        items: tuple[Sequence[int], Sequence[int], Sequence[int]] = ((), (), ()),
        linear: tuple[Sequence[int], Sequence[int]] = ((), ()),
        kernels: Mapping[str, Callable[..., list[jax.Array] | None]],
    ):
        self.reference = reference
        self.outputs = outputs
        self.x_ndims, self.aux_ndims, self.y_ndims = tuple(x_ndims), tuple(aux_ndims), tuple(y_ndims)
        self._x_cores, self._aux_cores, self._y_cores = (
            tuple(("q" + "." * (n - 1)) if i in of else "." * n for i, n in enumerate(ndims))
            for ndims, of in zip((self.x_ndims, self.aux_ndims, self.y_ndims), items, strict=True)
        )
        self._linear_x, self._linear_y = linear
        self._kernels = kernels
        if {"vjp", "vjp_vjp"} <= kernels.keys():
            self._kernels = {**kernels, "vjp_jvp": functools.partial(self._vjp_jvp_kernel, kernels.get("vjp_jvp"))}
        make = functools.partial(self._make, name)
        self.value = make("value", self._value)
        self.jvp = make("jvp", self._jvp)
        self.vjp = make("vjp", self._vjp)
        self.jvp_jvp = make("jvp_jvp", self._jvp_jvp)
        self.vjp_jvp = make("vjp_jvp", self._vjp_jvp)
        self.vjp_vjp = make("vjp_vjp", self._vjp_vjp)

        ad.primitive_jvps[self.value] = self._value_jvp_rule
        ad.primitive_jvps[self.jvp] = self._jvp_jvp_rule
        ad.primitive_jvps[self.vjp] = self._vjp_jvp_rule
        for p, impl in (
            (self.jvp_jvp, self._jvp_jvp),
            (self.vjp_jvp, self._vjp_jvp),
            (self.vjp_vjp, self._vjp_vjp),
        ):
            ad.primitive_jvps[p] = functools.partial(_reference_jvp_rule, p, impl)
        ad.primitive_transposes[self.jvp] = self._jvp_transpose_rule
        ad.primitive_transposes[self.vjp] = self._vjp_transpose_rule
        ad.primitive_transposes[self.jvp_jvp] = self._jvp_jvp_transpose_rule
        ad.primitive_transposes[self.vjp_jvp] = self._vjp_jvp_transpose_rule

    def __call__(self, *operands: jax.Array, implementation: str | None = None) -> tuple[jax.Array, ...]:
        return tuple(bind(self.value, *operands, implementation=implementation))

    # Operands of a primitive in groups: x, aux, then what the role adds.

    def _groups(self, operands: Sequence[Any], *masks: Mask) -> list[tuple[Any, ...]]:
        """x, aux, and one group per mask; groups with masks are spread out, with None where the mask is False."""
        nx, na = len(self.x_ndims), len(self.aux_ndims)
        groups = [tuple(operands[:nx]), tuple(operands[nx : nx + na])]
        at = nx + na
        for mask in masks:
            groups.append(_spread(operands[at : at + sum(mask)], mask))
            at += sum(mask)
        return groups

    def _cores(self, **p: Any) -> tuple[list[str], list[str]]:
        """Core axes of all operands and results of the primitive that has these masks, in their order."""
        operands = [*self._x_cores, *self._aux_cores]
        for key in _operand_masks(**p):
            operands += _pick(self._x_cores if key in _MASKS_OVER_X else self._y_cores, p[key])
        wanted = _wanted(**p)
        if wanted is None:
            return operands, list(self._y_cores)
        return operands, _pick((*self._x_cores, *self._y_cores)[: len(wanted)], wanted)

    def _ndims(self, **p: Any) -> list[int]:
        return [len(core) for core in self._cores(**p)[0]]

    # What each primitive computes, in pure JAX. Groups of tangents and cotangents are sparse.

    def _batched_reference(self, x: Operands, aux: Operands) -> tuple[jax.Array, ...]:
        n = len(x)
        return over_batch(lambda *o: self.reference(o[:n], o[n:]), (*x, *aux), (*self.x_ndims, *self.aux_ndims))

    def _value(self, *operands: Any) -> list[jax.Array]:
        x, aux = self._groups(operands)
        return list(self._batched_reference(x, aux))

    def _jvp(self, *operands: Any, wrt: Mask) -> list[jax.Array]:
        x, aux, dx = self._groups(operands, wrt)
        full = batch_shape(operands, self._ndims(wrt=wrt))
        dy = self._jvp_of(x, aux, dx)
        return [fit(d, full + d.shape[len(full) :]) for d in dy]

    def _jvp_of(self, x: Operands, aux: Operands, dx: Sparse) -> list[jax.Array]:
        return _pushed(lambda *x: list(self._batched_reference(x, aux)), x, dx, _counts(dx, self._linear_x))

    def _vjp(self, *operands: Any, wrt: Mask, outs: Mask, keep: Keep) -> list[jax.Array]:
        x, aux, ct = self._groups(operands, outs)
        shapes = self._kept_shapes(operands, wrt, keep, outs=outs)
        # A result that keeps an axis along which its operand is shared is the gradient of each copy of that operand.
        wide = [jnp.broadcast_to(a, _common(a, s)) for a, s in zip(_pick(x, wrt), shapes, strict=True)]

        counts = _counts(ct, self._linear_y)

        def f(*wide: jax.Array) -> list[jax.Array]:
            return _pick(self._batched_reference(_replaced(x, wrt, wide), aux), counts)

        y, pull = jax.vjp(f, *wide)
        bars = pull(_cotangents(_pick(ct, counts), y))
        return [fit(b, s) for b, s in zip(bars, shapes, strict=True)]

    def _jvp_jvp(self, *operands: Any, wrt: Mask, tx: Mask, tv: Mask) -> list[jax.Array]:
        x, aux, v, dx, dv = self._groups(operands, wrt, tx, tv)
        full = batch_shape(operands, self._ndims(wrt=wrt, tx=tx, tv=tv))
        n = len(x)

        def f(*z: jax.Array) -> list[jax.Array]:
            dy = self._jvp_of(z[:n], aux, _spread(z[n:], wrt))
            return [fit(d, full + d.shape[len(full) :]) for d in dy]

        dv = tuple(_pick(dv, wrt))
        counts = _counts(dx, self._linear_x) + (True,) * len(dv)
        return _pushed(f, (*x, *_pick(v, wrt)), (*dx, *dv), counts)

    def _vjp_jvp(self, *operands: Any, wrt: Mask, outs: Mask, keep: Keep, tx: Mask, tc: Mask) -> list[jax.Array]:
        x, aux, ct, dx, dct = self._groups(operands, outs, tx, tc)
        n = len(x)
        shapes = self._kept_shapes(operands, wrt, keep, outs=outs, tx=tx, tc=tc)

        def f(*z: jax.Array) -> list[jax.Array]:
            bars = self._vjp(*z[:n], *aux, *z[n:], wrt=wrt, outs=outs, keep=keep)
            return [fit(b, s) for b, s in zip(bars, shapes, strict=True)]

        counts = _counts(dx, self._linear_x) + tuple(_pick(_counts(dct, self._linear_y), outs))
        return _pushed(f, (*x, *_pick(ct, outs)), (*dx, *_pick(dct, outs)), counts)

    def _vjp_vjp(
        self, *operands: Any, outs: Mask, along: Mask, want_x: Mask, want_ct: Mask, keep: Keep
    ) -> list[jax.Array]:
        x, aux, ct, v = self._groups(operands, outs, along)
        shapes = self._kept_shapes(operands, want_x + want_ct, keep, outs=outs, along=along)
        wide = [
            jnp.broadcast_to(a, _common(a, s)) for a, s in zip(_pick(x, want_x), shapes[: sum(want_x)], strict=True)
        ]

        counts = _counts(ct, self._linear_y)

        def f(*wide: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
            dy = self._jvp_of(_replaced(x, want_x, wide), aux, v)
            return _pick(dy, counts), dy

        some, pull, dy = jax.vjp(f, *wide, has_aux=True)
        bars = pull(_cotangents(_pick(ct, counts), some))
        return [fit(b, s) for b, s in zip([*bars, *_pick(dy, want_ct)], shapes, strict=True)]

    # Shapes of results.

    def _kept_shapes(self, operands: Sequence[Any], wanted: Mask, keep: Keep, **masks: Mask) -> list[Shape]:
        """Shapes of the wanted among x_bar (and, where ``wanted`` is longer, of ct_bar behind them)."""
        full = batch_shape(operands, self._ndims(**masks))
        x, aux = self._groups(operands)
        cores: list[Shape] = [a.shape[len(full) :] for a in x]
        if len(wanted) > len(x):
            cores += [o.shape for o in self._core_outputs(x, aux)]
        return [
            tuple(n if k else 1 for n, k in zip(full, ks, strict=True)) + core
            for core, ks in zip(_pick(cores, wanted), keep, strict=True)
        ]

    def _core_outputs(self, x: Operands, aux: Operands) -> list[jax.ShapeDtypeStruct]:
        core = [
            jax.ShapeDtypeStruct(a.shape[len(a.shape) - n :], a.dtype)
            for a, n in zip((*x, *aux), (*self.x_ndims, *self.aux_ndims), strict=True)
        ]
        return list(self.outputs(tuple(core[: len(x)]), tuple(core[len(x) :])))

    def _outputs(self, *avals: Any, **p: Any) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the results of the primitive that has these masks."""
        x, aux = self._groups(avals)
        wanted = _wanted(**p)
        if wanted is None:
            full = batch_shape(avals, self._ndims(**p))
            return [jax.ShapeDtypeStruct(full + o.shape, o.dtype) for o in self._core_outputs(x, aux)]
        dtypes = [a.dtype for a in x]
        if len(wanted) > len(x):
            dtypes += [o.dtype for o in self._core_outputs(x, aux)]
        masks = {k: m for k, m in p.items() if k in ("outs", "along", "tx", "tc")}
        shapes = self._kept_shapes(avals, wanted, p["keep"], **masks)
        return [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, _pick(dtypes, wanted), strict=True)]

    # Rules. Primal and tangent are separate binds: linearize needs primal results that do not depend on tangents.

    def _value_jvp_rule(self, primals: Any, tangents: Any, *, implementation: str | None) -> Any:
        wrt = _nonzero(tangents[: len(self.x_ndims)])
        y = bind(self.value, *primals, implementation=implementation)
        if not any(wrt):
            return y, [ad.Zero(jax.typeof(a).to_tangent_aval()) for a in y]
        dx = _pick(tangents[: len(wrt)], wrt)
        return y, bind(self.jvp, *primals, *dx, wrt=wrt, implementation=implementation)

    def _jvp_transpose_rule(self, cts: Any, *operands: Any, wrt: Mask, implementation: str | None) -> Any:
        x, aux, dx = self._groups(operands, wrt)
        outs = _nonzero(cts)
        want = tuple(ad.is_undefined_primal(d) for d in dx)
        if not any(outs):
            bars = [ad.Zero(d.aval) for d in _pick(dx, want)]
        else:
            full = batch_shape(_pick(cts, outs), _pick(self.y_ndims, outs))
            bars = bind(
                self.vjp,
                *x,
                *aux,
                *_pick(cts, outs),
                wrt=want,
                outs=outs,
                keep=tuple(_kept(d.aval, full) for d in _pick(dx, want)),
                implementation=implementation,
            )
        return [None] * (len(x) + len(aux)) + _pick(_spread(bars, want), wrt)

    def _jvp_jvp_rule(self, primals: Any, tangents: Any, *, wrt: Mask, implementation: str | None) -> Any:
        x, aux, _ = self._groups(primals, wrt)
        dx, _, dv = self._groups(tangents, wrt)
        tx, tv = _nonzero(dx), _nonzero_present(dv)
        dy = bind(self.jvp, *primals, wrt=wrt, implementation=implementation)
        if not any(tx) and not any(tv):
            return dy, [ad.Zero(jax.typeof(a).to_tangent_aval()) for a in dy]
        if not any(tx):  # jvp is linear in v
            return dy, bind(self.jvp, *x, *aux, *_pick(dv, tv), wrt=tv, implementation=implementation)
        moving = (*_pick(dx, tx), *_pick(dv, tv))
        return dy, bind(self.jvp_jvp, *primals, *moving, wrt=wrt, tx=tx, tv=tv, implementation=implementation)

    def _jvp_jvp_transpose_rule(
        self, cts: Any, *operands: Any, wrt: Mask, tx: Mask, tv: Mask, implementation: str | None
    ) -> Any:
        x, aux, v, dx, dv = self._groups(operands, wrt, tx, tv)
        outs = _nonzero(cts)
        want_x, want_v = (tuple(ad.is_undefined_primal(d) for d in group) for group in (dx, dv))
        avals_x, avals_v = ([d.aval for d in _pick(group, want)] for group, want in ((dx, want_x), (dv, want_v)))
        bars_x, bars_v = ([ad.Zero(a) for a in avals] for avals in (avals_x, avals_v))
        if any(outs):
            ct = _pick(cts, outs)
            full = batch_shape(ct, _pick(self.y_ndims, outs))
            common = {"outs": outs, "implementation": implementation}
            keep_x, keep_v = (tuple(_kept(a, full) for a in avals) for avals in (avals_x, avals_v))
            if any(want_x):
                masks = {"along": wrt, "want_x": want_x, "want_ct": (False,) * len(outs), "keep": keep_x}
                bars_x = bind(self.vjp_vjp, *x, *aux, *ct, *_pick(v, wrt), **masks, **common)
            if any(want_v):
                bars_v = bind(self.vjp, *x, *aux, *ct, wrt=want_v, keep=keep_v, **common)
        before = [None] * (len(x) + len(aux) + sum(wrt))
        return before + _pick(_spread(bars_x, want_x), tx) + _pick(_spread(bars_v, want_v), tv)

    def _vjp_jvp_rule(
        self, primals: Any, tangents: Any, *, wrt: Mask, outs: Mask, keep: Keep, implementation: str | None
    ) -> Any:
        x, aux, _ = self._groups(primals, outs)
        dx, _, dct = self._groups(tangents, outs)
        tx = _nonzero(dx)
        tc = _nonzero_present(dct)
        bars = bind(self.vjp, *primals, wrt=wrt, outs=outs, keep=keep, implementation=implementation)
        if not any(tx) and not any(tc):
            return bars, [ad.Zero(jax.typeof(a).to_tangent_aval()) for a in bars]
        if not any(tx):  # vjp is linear in ct
            dbars = bind(
                self.vjp, *x, *aux, *_pick(dct, tc), wrt=wrt, outs=tc, keep=keep, implementation=implementation
            )
        else:
            dbars = bind(
                self.vjp_jvp,
                *primals,
                *_pick(dx, tx),
                *_pick(dct, tc),
                wrt=wrt,
                outs=outs,
                keep=keep,
                tx=tx,
                tc=tc,
                implementation=implementation,
            )
        return bars, dbars

    def _vjp_transpose_rule(
        self, cts: Any, *operands: Any, wrt: Mask, outs: Mask, keep: Keep, implementation: str | None
    ) -> Any:
        x, aux, ct = self._groups(operands, outs)
        v = _spread(cts, wrt)
        along = _nonzero_present(v)
        want = tuple(ad.is_undefined_primal(c) for c in ct)
        if any(along):
            dy = bind(self.jvp, *x, *aux, *_pick(v, along), wrt=along, implementation=implementation)
            bars: list[Any] = [fit(d, c.aval.shape) for d, c in zip(_pick(dy, want), _pick(ct, want), strict=True)]
        else:
            bars = [ad.Zero(c.aval) for c in _pick(ct, want)]
        return [None] * (len(x) + len(aux)) + _pick(_spread(bars, want), outs)

    def _vjp_jvp_transpose_rule(
        self,
        cts: Any,
        *operands: Any,
        wrt: Mask,
        outs: Mask,
        keep: Keep,
        tx: Mask,
        tc: Mask,
        implementation: str | None,
    ) -> Any:
        x, aux, ct, dx, dct = self._groups(operands, outs, tx, tc)
        v = _spread(cts, wrt)
        along = _nonzero_present(v)
        want_x = tuple(ad.is_undefined_primal(d) for d in dx)
        want_ct = tuple(ad.is_undefined_primal(d) for d in dct)
        avals = [d.aval for d in (*_pick(dx, want_x), *_pick(dct, want_ct))]
        if any(along):
            given = [*x, *aux, *_pick(ct, outs), *_pick(v, along)]
            full = batch_shape(given, self._ndims(outs=outs, along=along))
            bars = bind(
                self.vjp_vjp,
                *given,
                outs=outs,
                along=along,
                want_x=want_x,
                want_ct=want_ct,
                keep=tuple(_kept(a, full) for a in avals),
                implementation=implementation,
            )
        else:
            bars = [ad.Zero(a) for a in avals]
        bars_x, bars_ct = _spread(bars[: sum(want_x)], want_x), _spread(bars[sum(want_x) :], want_ct)
        return [None] * (len(x) + len(aux) + sum(outs)) + _pick(bars_x, tx) + _pick(bars_ct, tc)

    # Primitives.

    def _make(self, name: str, role: str, impl: Callable[..., list[jax.Array]]) -> Any:
        kernel = self._kernels.get(role)
        return make_primitive(
            f"{name}_{role}",
            reference=impl,
            outputs=self._outputs,
            cores=self._cores,
            kernel=functools.partial(self._run_kernel, kernel) if kernel else None,
            add_batch_axis=lambda p: {**p, "keep": tuple((True, *ks) for ks in p["keep"])} if "keep" in p else p,
        )

    def _vjp_jvp_kernel(
        self,
        own: Callable[..., list[jax.Array] | None] | None,
        platform: str,
        batch: Shape,
        x: Operands,
        aux: Operands,
        ct: Sparse,
        dx: Sparse,
        dct: Sparse,
        results: tuple[jax.ShapeDtypeStruct | None, ...],
    ) -> list[jax.Array] | None:
        both = own(platform, batch, x, aux, ct, dx, dct, results) if own else None
        if both is not None:
            return both
        nothing = (None,) * len(self.y_ndims)
        bars = self._kernels["vjp_vjp"](platform, batch, x, aux, ct, dx, (*results, *nothing))
        if bars is None or all(c is None for c in dct):
            return bars
        more = self._kernels["vjp"](platform, batch, x, aux, dct, results)
        return None if more is None else [a + b for a, b in zip(bars, more, strict=True)]

    def _run_kernel(
        self, kernel: Callable[..., list[jax.Array] | None], platform: str, *operands: jax.Array, **p: Any
    ) -> list[jax.Array] | None:
        """Calls ``kernel`` with merged batch axes and sparse groups, and gives its results their shapes back."""
        masks = [p[key] for key in _operand_masks(**p)]
        wanted = _wanted(**p)

        def call(operands: Sequence[jax.Array], results: Sequence[jax.ShapeDtypeStruct], full: Shape) -> Any:
            results = tuple(results) if wanted is None else _spread(results, wanted)
            return kernel(platform, full, *self._groups(operands, *masks), results)

        depth = operands[0].ndim - self.x_ndims[0]
        return over_merged_batch(call, operands, depth, self._outputs(*operands, **p))


_MASKS_OVER_X = ("wrt", "along", "tx", "tv")


def _operand_masks(**p: Any) -> list[str]:
    """Those of a primitive's parameters that say which operands follow x and aux, in operand order."""
    keys = ("outs", "along", "tx", "tc") if "outs" in p else ("wrt", "tx", "tv")  # vjp's wrt says what is wanted
    return [key for key in keys if key in p]


def _wanted(**p: Any) -> Mask | None:
    """Which of x_bar (and ct_bar behind them) a primitive returns; None where it returns all of y."""
    if "keep" not in p:
        return None
    return p["wrt"] if "wrt" in p else p["want_x"] + p["want_ct"]


def _common(a: Any, b: Any) -> Shape:
    """The shape that two shapes or arrays of equal rank, with sizes n or 1 along batch axes, broadcast to."""
    return jnp.broadcast_shapes(getattr(a, "shape", a), getattr(b, "shape", b))


def _replaced(values: Operands, mask: Mask, some: Iterable[jax.Array]) -> Operands:
    """``values`` with those of ``some`` in place of the values where the mask is True."""
    it = iter(some)
    return tuple(next(it) if m else a for a, m in zip(values, mask, strict=True))


def _counts(group: Sparse, linear: Sequence[int]) -> Mask:
    """Which tangents or cotangents are differentiated along: those that are given, and zeros unless left out."""
    return tuple(a is not None or i not in linear for i, a in enumerate(group))


def _cotangents(some: Iterable[jax.Array | None], y: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.zeros_like(a) if c is None else fit(c, a.shape) for a, c in zip(y, some, strict=True)]


def _pushed(f: Callable[..., list[jax.Array]], primals: Operands, tangents: Sparse, counts: Mask) -> list[jax.Array]:
    """The tangents of f(*primals) along ``tangents``, with the batch axes of both.

    None is zero, or left out where ``counts`` is False.
    """
    wide, dense = [], []
    for a, t in _pick(zip(primals, tangents, strict=True), counts):
        shape = a.shape if t is None else _common(a, t)
        wide.append(jnp.broadcast_to(a, shape))
        dense.append(jnp.zeros(shape, a.dtype) if t is None else jnp.broadcast_to(t, shape))
    return list(jax.jvp(lambda *some: f(*_replaced(primals, counts, some)), wide, dense)[1])


def _kept(aval: Any, full: Shape) -> Mask:
    return tuple(n == m for n, m in zip(aval.shape, full, strict=False))


def _reference_jvp_rule(
    primitive: Any, impl: Callable[..., list[jax.Array]], primals: Any, tangents: Any, **p: Any
) -> Any:
    """JVP of a primitive without a rule of its own: differentiate its pure-JAX computation. Third order and up."""
    shardings = [jax.typeof(a).sharding for a in jax.eval_shape(functools.partial(primitive.bind, **p), *primals)]
    if p.pop("implementation") == "ffi":
        raise NotImplementedError(
            f"{primitive.name}: implementation='ffi' was asked for, but there are no kernels for derivatives beyond "
            "the second order. implementation=None uses kernels where there are some, and pure JAX for the rest."
        )
    floats = [jnp.issubdtype(jax.typeof(a).dtype, jnp.inexact) for a in primals]

    reference = left_to_partitioner(functools.partial(impl, **p), shardings)

    def f(*z: jax.Array) -> list[jax.Array]:
        it = iter(z)
        return reference(*[next(it) if m else a for a, m in zip(primals, floats, strict=True)])

    moving = tuple(a for a, m in zip(primals, floats, strict=True) if m)
    along = tuple(ad.instantiate_zeros(t) for t, m in zip(tangents, floats, strict=True) if m)
    return jax.jvp(f, moving, along)
