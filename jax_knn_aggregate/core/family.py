"""One machine for derivatives: an op and its derivatives to any order, from one reference formula and a few kernels.

A *family* is six primitives around a pure-JAX function ``reference(x, aux) -> y``, where ``x`` is a tuple of
differentiable operands, ``aux`` a tuple of operands that never move (indices, say) and ``y`` a tuple of float results.
With J the Jacobian of the reference at x:

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

Masks over x and y say which operands carry a tangent (or a cotangent) and which results are wanted. Symbolic zeros are
dropped by these masks, never instantiated: a kernel computes what is asked for and nothing else.

This module knows no op: nothing of neighbours or Gaussians.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad

from .batch import Shape, fit, over_batch, over_merged_batch
from .primitive import bind, make_primitive
from .sharding import left_to_partitioner

Mask = tuple[bool, ...]
Operands = tuple[jax.Array, ...]
Structs = tuple[jax.ShapeDtypeStruct, ...]
#: As many entries as the family has operands (or results), None for what is not there.
Sparse = tuple[jax.Array | None, ...]
#: The same of results: the shape and dtype of each that is wanted, None for what is not.
Wanted = tuple[jax.ShapeDtypeStruct | None, ...]


class Role(NamedTuple):
    """What a primitive takes after x and aux, in groups, and what it returns: each over "x" or over "y"."""

    groups: str
    results: str


ROLES = {
    "value": Role("", "y"),
    "jvp": Role("x", "y"),  # dx
    "vjp": Role("y", "x"),  # ct
    "jvp_jvp": Role("xxx", "y"),  # v, dx, dv
    "vjp_jvp": Role("yxy", "x"),  # ct, dx, dct
    "vjp_vjp": Role("yx", "xy"),  # ct, v
}


class Masks(NamedTuple):
    """The static parameter of a family's primitives.

    Attributes:
      given: for each group of the role, which of its members are operands. All others are zero.
      wanted: which results are wanted: all of them where they are y or its tangents.
      keep: for each wanted result and each batch axis: whether the result keeps the axis (True) or sums over it
        (False). y and its tangents keep all.
    """

    given: tuple[Mask, ...]
    wanted: Mask
    keep: tuple[Mask, ...]

    def with_batch_axis(self) -> Masks:
        return self._replace(keep=tuple((True, *axes) for axes in self.keep))

    def __repr__(self) -> str:
        """For jaxprs: <given 100 10000, wanted 01111000, keep 01 01 01 01>, without ``keep`` where all is kept."""
        shown = {"given": self.given, "wanted": [self.wanted], "keep": [] if all(map(all, self.keep)) else self.keep}
        bits = {name: ["".join("01"[b] for b in mask) for mask in masks] for name, masks in shown.items()}
        return f"<{', '.join(' '.join([name, *of]) for name, of in bits.items() if of)}>"


def _pick(values: Iterable[Any], mask: Mask) -> list[Any]:
    return [v for v, m in zip(values, mask, strict=True) if m]


def _spread(values: Iterable[Any], mask: Mask) -> tuple[Any, ...]:
    """The inverse of ``_pick``: None where the mask is False."""
    it = iter(values)
    return tuple(next(it) if m else None for m in mask)


def _there(values: Iterable[Any]) -> Mask:
    return tuple(v is not None and type(v) is not ad.Zero for v in values)


def _undefined(values: Iterable[Any]) -> Mask:
    return tuple(ad.is_undefined_primal(v) for v in values)


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
      pays: ``pays(role, platform, x, wanted)``, whether a kernel is faster than the reference. Where it is not, it runs
        only if ``implementation`` is "ffi".

    A kernel is ``kernel(platform, batch, x, aux, ..., results) -> list of arrays, or None`` where it cannot serve.
    ``batch`` is the full size of the batch axes, which come merged; a result of size 1 along one is summed over it.
    Between aux and results stand the groups of the role (``ROLES``), each with None where it is zero. ``results`` holds
    the wanted results' shapes and dtypes, with None for what is not wanted: y for "value" and "jvp", x_bar for "vjp"
    and "vjp_jvp", x_bar + ct_bar for "vjp_vjp". Where one FFI target serves all roles, ``one_target.py`` makes these
    functions.

    JAX keeps primitives as long as the process lives, so a family is made once. Where families depend on a static
    configuration (a metric; a number of layers, and with it of operands), a function of it makes them, under
    ``functools.cache``. That keeps no more than JAX does anyway: some 30 kB for each configuration that is used.
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
        pays: Callable[[str, str, Operands, Mask], bool] = lambda role, platform, x, wanted: True,
    ):
        self.reference = reference
        self.outputs = outputs
        self.x_ndims, self.aux_ndims, self.y_ndims = tuple(x_ndims), tuple(aux_ndims), tuple(y_ndims)
        self._core_axes = {
            group: [("q" + "." * (n - 1)) if i in of else "." * n for i, n in enumerate(ndims)]
            for group, ndims, of in zip(("x", "aux", "y"), (x_ndims, aux_ndims, y_ndims), items, strict=True)
        }
        self._linear_x, self._linear_y = linear
        self._kernels, self._kernel_pays = kernels, pays
        if {"vjp", "vjp_vjp"} <= kernels.keys():
            self._kernels = {**kernels, "vjp_jvp": functools.partial(self._vjp_jvp_kernel, kernels.get("vjp_jvp"))}
        make = functools.partial(self._make, name)
        self.value = make("value", self._value)
        self.jvp = make("jvp", self._jvp)
        self.vjp = make("vjp", self._vjp)
        self.jvp_jvp = make("jvp_jvp", self._jvp_jvp)
        self.vjp_jvp = make("vjp_jvp", self._vjp_jvp)
        self.vjp_vjp = make("vjp_vjp", self._vjp_vjp)

        for p, derivative in ((self.value, self.jvp), (self.jvp, self.jvp_jvp), (self.vjp, self.vjp_jvp)):
            ad.primitive_jvps[p] = functools.partial(self._jvp_rule, p, derivative)
        for p, pull in (
            (self.jvp, self._pull_jvp),
            (self.vjp, self._pull_vjp),
            (self.jvp_jvp, self._pull_jvp_jvp),
            (self.vjp_jvp, self._pull_vjp_jvp),
        ):
            ad.primitive_transposes[p] = functools.partial(self._transpose_rule, pull)

    def __call__(self, *operands: jax.Array, implementation: str | None = None) -> tuple[jax.Array, ...]:
        return tuple(bind(self.value, *operands, masks=self._for_y(operands, ()), implementation=implementation))

    # Operands of a primitive in groups: x, aux, then what the role adds.

    def _groups(self, operands: Sequence[Any], given: Sequence[Mask]) -> list[tuple[Any, ...]]:
        """x, aux, and the groups that masks are given of, spread out."""
        nx, n = len(self.x_ndims), len(self.x_ndims) + len(self.aux_ndims)
        rest = iter(operands[n:])
        return [tuple(operands[:nx]), tuple(operands[nx:n]), *(_spread(rest, mask) for mask in given)]

    def _joined(self, x: Operands, aux: Operands, *groups: Sequence[Any]) -> tuple[list[Any], tuple[Mask, ...]]:
        """The inverse of ``_groups``: operands, and which members of the groups are there."""
        given = tuple(map(_there, groups))
        return [*x, *aux, *(a for group, mask in zip(groups, given, strict=True) for a in _pick(group, mask))], given

    def _batch(self, operands: Sequence[Any]) -> Shape:
        depth = operands[0].ndim - self.x_ndims[0]
        return jnp.broadcast_shapes(*(a.shape[:depth] for a in operands))

    def _for_y(self, operands: Sequence[Any], given: tuple[Mask, ...]) -> Masks:
        n, depth = len(self.y_ndims), operands[0].ndim - self.x_ndims[0]
        return Masks(given, (True,) * n, ((True,) * depth,) * n)

    def _cores(self, role: Role, *, masks: Masks) -> tuple[list[str], list[str]]:
        """Core axes of all operands and results, in their order."""
        operands = [*self._core_axes["x"], *self._core_axes["aux"]]
        for group, mask in zip(role.groups, masks.given, strict=True):
            operands += _pick(self._core_axes[group], mask)
        return operands, _pick((core for group in role.results for core in self._core_axes[group]), masks.wanted)

    def _outputs(self, role: Role, *avals: Any, masks: Masks) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the results."""
        full = self._batch(avals)
        x, aux = (
            tuple(jax.ShapeDtypeStruct(a.shape[len(full) :], a.dtype) for a in group)
            for group in self._groups(avals, ())
        )
        cores = [core for group in role.results for core in (x if group == "x" else self.outputs(x, aux))]
        return [
            jax.ShapeDtypeStruct((*(n if k else 1 for n, k in zip(full, keep, strict=True)), *core.shape), core.dtype)
            for core, keep in zip(_pick(cores, masks.wanted), masks.keep, strict=True)
        ]

    # What each primitive computes, in pure JAX, up to a ``fit`` to the results' shapes. Called as kernels are.

    def _reference(
        self, role: Role, compute: Callable[..., Sequence[jax.Array]], *operands: jax.Array, masks: Masks
    ) -> list[jax.Array]:
        results = self._outputs(role, *operands, masks=masks)
        got = compute(*self._groups(operands, masks.given), _spread(results, masks.wanted))
        return [fit(a, s.shape) for a, s in zip(got, results, strict=True)]

    def _value(self, x: Operands, aux: Operands, _: Wanted = ()) -> Sequence[jax.Array]:
        n = len(x)
        return over_batch(lambda *o: self.reference(o[:n], o[n:]), (*x, *aux), (*self.x_ndims, *self.aux_ndims))

    def _jvp(self, x: Operands, aux: Operands, dx: Sparse, _: Wanted = ()) -> list[jax.Array]:
        return _pushed(lambda *x: self._value(x, aux), x, dx, _counts(dx, self._linear_x))

    def _vjp(self, x: Operands, aux: Operands, ct: Sparse, x_bar: Wanted) -> list[jax.Array]:
        return self._pulled(lambda x: self._value(x, aux), x, ct, x_bar)[0]

    def _jvp_jvp(self, x: Operands, aux: Operands, v: Sparse, dx: Sparse, dv: Sparse, _: Wanted) -> list[jax.Array]:
        n, along = len(x), _there(v)
        moved = _pick(dv, along)
        counts = _counts(dx, self._linear_x) + (True,) * len(moved)
        return _pushed(
            lambda *z: self._jvp(z[:n], aux, _spread(z[n:], along)), (*x, *_pick(v, along)), (*dx, *moved), counts
        )

    def _vjp_jvp(
        self, x: Operands, aux: Operands, ct: Sparse, dx: Sparse, dct: Sparse, x_bar: Wanted
    ) -> list[jax.Array]:
        n, along = len(x), _there(ct)
        counts = (*_counts(dx, self._linear_x), *_pick(_counts(dct, self._linear_y), along))
        return _pushed(
            lambda *z: self._vjp(z[:n], aux, _spread(z[n:], along), x_bar),
            (*x, *_pick(ct, along)),
            (*dx, *_pick(dct, along)),
            counts,
        )

    def _vjp_vjp(self, x: Operands, aux: Operands, ct: Sparse, v: Sparse, bars: Wanted) -> list[jax.Array]:
        x_bar, ct_bar = bars[: len(x)], bars[len(x) :]
        got, dy = self._pulled(lambda x: self._jvp(x, aux, v), x, ct, x_bar)
        return got + _pick(dy, _there(ct_bar))

    def _pulled(
        self, f: Callable[[Operands], Sequence[jax.Array]], x: Operands, ct: Sparse, x_bar: Wanted
    ) -> tuple[list[jax.Array], Sequence[jax.Array]]:
        """The wanted gradients of ⟨ct, f(x)⟩, and f(x)."""
        wanted, counts = _there(x_bar), _counts(ct, self._linear_y)
        # A result that keeps an axis along which its operand is shared is the gradient of each copy of that operand.
        wide = [jnp.broadcast_to(a, _common(a, s)) for a, s in _pick(zip(x, x_bar, strict=True), wanted)]

        def some(*wide: jax.Array) -> tuple[list[jax.Array], Sequence[jax.Array]]:
            y = f(_replaced(x, wanted, wide))
            return _pick(y, counts), y

        counted, pull, y = jax.vjp(some, *wide, has_aux=True)
        return list(pull(_cotangents(_pick(ct, counts), counted))), y

    # Rules. Primal and tangent are separate binds: linearize needs primal results that do not depend on tangents.

    def _jvp_rule(
        self, p: Primitive, derivative: Primitive, primals: Any, tangents: Any, *, masks: Masks, implementation: Any
    ) -> Any:
        """Of a primitive that is linear in its group, if it has one; ``derivative`` takes dx and d(group) besides."""
        results = bind(p, *primals, masks=masks, implementation=implementation)
        x, aux, *group = self._groups(primals, masks.given)
        dx, _, *moving = self._groups(tangents, masks.given)
        if not any(map(any, map(_there, (dx, *moving)))):
            return results, [ad.Zero(jax.typeof(a).to_tangent_aval()) for a in results]
        if any(_there(dx)):
            p, moving = derivative, [*group, dx, *moving]
        operands, given = self._joined(x, aux, *moving)
        return results, bind(p, *operands, masks=masks._replace(given=given), implementation=implementation)

    def _transpose_rule(
        self, pull: Callable[..., list[Any]], cts: Any, *operands: Any, masks: Masks, implementation: str | None
    ) -> Any:
        """``pull`` gives the cotangents of the undefined operands, where any of ``cts`` is not zero."""
        undefined = _undefined(operands)
        if any(_there(cts)):
            bars = pull(_spread(cts, masks.wanted), *self._groups(operands, masks.given), implementation=implementation)
        else:
            bars = [ad.Zero(o.aval) for o in _pick(operands, undefined)]
        return list(_spread(bars, undefined))

    def _pull_jvp(self, ct: Any, x: Any, aux: Any, dx: Any, **options: Any) -> list[Any]:
        return self._gradients(self.vjp, x, aux, ct, of=dx, **options)

    def _pull_vjp(self, v: Any, x: Any, aux: Any, ct: Any, **options: Any) -> list[Any]:
        operands, given = self._joined(x, aux, v)
        dy = bind(self.jvp, *operands, masks=self._for_y(operands, given), **options)
        return [fit(d, c.aval.shape) for d, c in _pick(zip(dy, ct, strict=True), _undefined(ct))]

    def _pull_jvp_jvp(self, ct: Any, x: Any, aux: Any, v: Any, dx: Any, dv: Any, **options: Any) -> list[Any]:
        none = (None,) * len(ct)
        of_x = self._gradients(self.vjp_vjp, x, aux, ct, v, of=(*dx, *none), **options) if any(_undefined(dx)) else []
        of_v = self._gradients(self.vjp, x, aux, ct, of=dv, **options) if any(_undefined(dv)) else []
        return of_x + of_v

    def _pull_vjp_jvp(self, v: Any, x: Any, aux: Any, ct: Any, dx: Any, dct: Any, **options: Any) -> list[Any]:
        return self._gradients(self.vjp_vjp, x, aux, ct, v, of=(*dx, *dct), **options)

    def _gradients(self, p: Primitive, x: Any, aux: Any, *groups: Any, of: Sequence[Any], **options: Any) -> list[Any]:
        """Those of p's results that stand where ``of`` is undefined, in the shapes that are expected there."""
        operands, given = self._joined(x, aux, *groups)
        full, wanted = self._batch(operands), _undefined(of)
        keep = tuple(tuple(n == m for n, m in zip(d.aval.shape, full, strict=False)) for d in _pick(of, wanted))
        return bind(p, *operands, masks=Masks(given, wanted, keep), **options)

    # Primitives.

    def _make(self, name: str, role_name: str, compute: Callable[..., Sequence[jax.Array]]) -> Primitive:
        role, kernel = ROLES[role_name], self._kernels.get(role_name)
        reference = functools.partial(self._reference, role, compute)
        p = make_primitive(
            f"{name}_{role_name}",
            reference=reference,
            outputs=functools.partial(self._outputs, role),
            cores=functools.partial(self._cores, role),
            kernel=functools.partial(self._run_kernel, role, kernel) if kernel else None,
            pays=functools.partial(self._pays, role_name),
            add_batch_axis=lambda params: {**params, "masks": params["masks"].with_batch_axis()},
        )
        ad.primitive_jvps[p] = functools.partial(_reference_jvp_rule, p, reference)  # where there is no other
        return p

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
        results: Wanted,
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

    def _pays(self, role_name: str, platform: str, *operands: jax.Array, masks: Masks) -> bool:
        return self._kernel_pays(role_name, platform, operands[: len(self.x_ndims)], masks.wanted)

    def _run_kernel(
        self,
        role: Role,
        kernel: Callable[..., list[jax.Array] | None],
        platform: str,
        *operands: jax.Array,
        masks: Masks,
    ) -> list[jax.Array] | None:
        """Calls ``kernel`` with merged batch axes and sparse groups, and gives its results their shapes back."""

        def call(operands: Sequence[jax.Array], results: Sequence[jax.ShapeDtypeStruct], full: Shape) -> Any:
            return kernel(platform, full, *self._groups(operands, masks.given), _spread(results, masks.wanted))

        depth = operands[0].ndim - self.x_ndims[0]
        return over_merged_batch(call, operands, depth, self._outputs(role, *operands, masks=masks))


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


def _pushed(
    f: Callable[..., Sequence[jax.Array]], primals: Operands, tangents: Sparse, counts: Mask
) -> list[jax.Array]:
    """The tangents of f(*primals) along ``tangents``, with the batch axes of both.

    None is zero, or left out where ``counts`` is False.
    """
    wide, dense = [], []
    for a, t in _pick(zip(primals, tangents, strict=True), counts):
        shape = a.shape if t is None else _common(a, t)
        wide.append(jnp.broadcast_to(a, shape))
        dense.append(jnp.zeros_like(wide[-1]) if t is None else jnp.broadcast_to(t, shape))
    return list(jax.jvp(lambda *some: list(f(*_replaced(primals, counts, some))), wide, dense)[1])


def _reference_jvp_rule(
    primitive: Primitive, reference: Callable[..., list[jax.Array]], primals: Any, tangents: Any, **p: Any
) -> Any:
    """JVP of a primitive without a rule of its own: differentiate its pure-JAX computation. Third order and up."""
    shardings = [jax.typeof(a).sharding for a in jax.eval_shape(functools.partial(primitive.bind, **p), *primals)]
    if p.pop("implementation") == "ffi":
        raise NotImplementedError(
            f"{primitive.name}: implementation='ffi' was asked for, but there are no kernels for derivatives beyond "
            "the second order. implementation=None uses kernels where there are some, and pure JAX for the rest."
        )
    floats = [jnp.issubdtype(jax.typeof(a).dtype, jnp.inexact) for a in primals]

    whole = left_to_partitioner(functools.partial(reference, **p), shardings)

    def f(*z: jax.Array) -> list[jax.Array]:
        it = iter(z)
        return whole(*[next(it) if m else a for a, m in zip(primals, floats, strict=True)])

    moving = tuple(a for a, m in zip(primals, floats, strict=True) if m)
    along = tuple(ad.instantiate_zeros(t) for t, m in zip(tangents, floats, strict=True) if m)
    return jax.jvp(f, moving, along)
