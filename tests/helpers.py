"""Oracles, clouds and comparisons that the tests share. Nothing here uses the package's own formulas.

Names: ``metric`` is "aniso" or "iso"; ``x`` is the tuple of differentiable arguments, (q, p, f, sigma, R) or
(q, p, f, sigma); ``idxs`` are neighbours; ``ct`` and ``v`` are dicts of cotangents by output and tangents by argument.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_knn_aggregate as jka

#: JAX's name, in lowerings, of the default platform.
PLATFORM = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
#: Targets without which some search or derivative of first or second order would silently run the reference, or slowly.
ROLES = ("index", "search", "value", "jvp", "vjp", "vjp_vjp", "vjp_jvp")
REQUIRED = {f"{metric}_{role}" for metric in ("aniso", "iso") for role in ROLES}
REQUIRED |= {"invert", "distortion", "flat_distortion", "ray_offsets", "hash_grid"}
REQUIRED |= {"splat_tiles", "splat_forward", "splat_backward", "splat_project"}
if PLATFORM == "cpu":
    REQUIRED |= {"mlp"}  # on CUDA it is built on request

ARGUMENTS = {"aniso": ("q", "p", "f", "sigma", "R"), "iso": ("q", "p", "f", "sigma")}
OUTPUTS = ("f_out", "w_out", "dists")
METRICS = ("aniso", "iso")

# ---- Compiling


@functools.cache
def _fast_options():
    """Compiler options for tests of structure and not of rounding: on the CPU, compile times would dominate."""
    if PLATFORM != "cpu":
        return {}
    candidates = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_opt_preset": "CPU_OPT_PRESET_FAST_COMPILE",
    }
    accepted = {}
    for name, value in candidates.items():  # XLA drops options between versions
        try:
            jax.jit(lambda a: a, compiler_options={name: value})(jnp.float32(0))
        except jax.errors.JaxRuntimeError:
            continue
        accepted[name] = value
    return accepted


def quick_jit(fn):
    """jax.jit with little optimisation. Accuracy and bits are tested under ``user_jit``."""
    return jax.jit(fn, compiler_options=_fast_options())


@functools.cache
def _user_options():
    if "--xla_backend_optimization_level=0" not in os.environ.get("XLA_FLAGS", "").split():
        return {}
    usual = {
        "xla_backend_optimization_level": 3,
        "xla_cpu_use_fusion_emitters": True,
        "xla_cpu_opt_preset": "CPU_OPT_PRESET_DEFAULT",
    }
    return {name: usual[name] for name in _fast_options()}


def user_jit(fn):
    """jax.jit as users have it, also where conftest.py has XLA compile quickly."""
    return jax.jit(fn, compiler_options=_user_options())


# ---- The op under test


def aggregate(metric, x, K, **options):
    return (jka.knn_aggregate_aniso if metric == "aniso" else jka.knn_aggregate)(*x, K, **options)


def search(metric, x, K, **options):
    if metric == "aniso":
        return jka.knn_search_aniso(x[0], x[1], x[3], x[4], K, **options)
    return jka.knn_search(x[0], x[1], K, **options)


def precomputed(metric, x, idxs, **options):
    return (jka.knn_aggregate_aniso_precomputed if metric == "aniso" else jka.knn_aggregate_precomputed)(
        *x, idxs, **options
    )


@functools.cache
def jitted(metric, K, implementation, lengths=False):
    """The op under user_jit, whose dists ascend; the same compiled function for every test that asks for it."""
    if lengths:
        return user_jit(lambda x, n: aggregate(metric, x, K, p_lengths=n, implementation=implementation))
    return user_jit(lambda x: aggregate(metric, x, K, implementation=implementation))


@functools.cache
def jitted_search(metric, K, implementation, lengths=False):
    if lengths:
        return user_jit(lambda x, n: search(metric, x, K, p_lengths=n, implementation=implementation))
    return user_jit(lambda x: search(metric, x, K, implementation=implementation))


def outputs(metric, K, implementation=None, **options):
    """The op as a function of its differentiable arguments with the three float results."""
    return lambda *x: aggregate(metric, x, K, implementation=implementation, **options)[:3]


# ---- NumPy oracle: search and values, in the dtype of what it is given (float64, or complex for complex steps)


def pair_distances(metric, x):
    """(Q, P) distances of all pairs, without batch axis."""
    with np.errstate(all="ignore"):
        d = x[0][:, None, :] - x[1][None, :, :]
        return _distances(metric, d, x[3][None], *(a[None] for a in x[4:]))


def _distances(metric, d, sigma, R=None):
    if metric == "iso":
        return (d * d).sum(-1)
    u = (R * d[..., None, :]).sum(-1)
    return (sigma * u * u).sum(-1)


def nearest(dists, K, length=None):
    """(Q, K) indices by (number, NaN, missing), then distance, then index; −1 where there is no point."""
    P = dists.shape[-1]
    index = np.broadcast_to(np.arange(P), dists.shape)
    kind = np.where(index >= (P if length is None else length), 2, np.where(np.isnan(dists), 1, 0))
    order = np.lexsort((index, np.where(kind == 0, dists, 0), kind), axis=-1)[:, :K]
    return np.where(np.take_along_axis(kind, order, -1) == 2, -1, order)


def oracle_search(metric, x, K, lengths=None):
    """float64 neighbours. Distances are cast to the inputs' dtype first, so that what overflows there ties here."""
    q = np.asarray(x[0])
    if q.ndim == 3:
        lengths = [None] * len(q) if lengths is None else lengths
        rows = [oracle_search(metric, [a[b] for a in x], K, n) for b, n in zip(range(len(q)), lengths, strict=True)]
        return np.stack(rows) if rows else np.zeros((0, q.shape[1], K), int)
    with np.errstate(all="ignore"):
        dists = pair_distances(metric, wide(x)).astype(q.dtype)
    return nearest(dists, K, None if lengths is None else np.clip(lengths, 0, x[1].shape[0]))


def oracle_values(metric, x, idxs):
    """f_out, w_out, dists of given neighbours by the formula, in NumPy."""
    if np.ndim(x[0]) == 3:
        rows = [oracle_values(metric, [a[b] for a in x], idxs[b]) for b in range(len(x[0]))]
        if rows:
            return tuple(np.stack(r) for r in zip(*rows, strict=True))
        Q, F, K = x[0].shape[1], x[2].shape[2], idxs.shape[2]
        return np.zeros((0, Q, F)), np.zeros((0, Q, K)), np.zeros((0, Q, K))
    q, p, f, sigma, *R = x
    exists = (idxs >= 0) & (idxs < p.shape[0])
    at = np.where(exists, idxs, 0)
    with np.errstate(all="ignore"):
        dists = _distances(metric, q[:, None] - p[at], sigma[at], *(a[at] for a in R))
        w = np.exp(-dists if metric == "aniso" else -sigma[at][..., 0] * dists)
        exists &= dists != np.inf  # from there on, such a neighbour is none
        w = np.where(exists, w, 0)
        f_out = (w[..., None] * np.where(exists[..., None], f[at], 0)).sum(1)
    return f_out, w, np.where(exists, dists, np.inf)


def oracle(metric, x, K, lengths=None):
    idxs = oracle_search(metric, x, K, lengths)
    return (*oracle_values(metric, wide(x), idxs), idxs)


def wide(tree):
    """NumPy float64 copies of float arrays of any precision."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


# ---- JAX oracle: derivatives of any order, float64, einsum form; knn/test_oracle.py checks it against the other one


def formula(metric, idxs):
    """f_out, w_out, dists of given neighbours, as a function of x."""

    def one(idxs, q, p, f, sigma, *R):
        exists = (idxs >= 0) & (idxs < p.shape[0])
        at = jnp.where(exists, idxs, 0)
        d = jnp.where(exists[..., None], q[:, None, :] - p[at], 0.0)
        if metric == "aniso":
            u = jnp.einsum("qkij,qkj->qki", R[0][at], d)
            dists = jnp.einsum("qki,qki,qki->qk", sigma[at], u, u)
            exponent = dists
        else:
            dists = jnp.einsum("qki,qki->qk", d, d)
            exponent = sigma[at][..., 0] * dists
        w = jnp.where(exists, jnp.exp(-exponent), 0.0)
        return jnp.einsum("qk,qkf->qf", w, f[at]), w, jnp.where(exists, dists, jnp.inf)

    def fn(*x):
        return jax.vmap(one)(idxs, *x) if x[0].ndim == 3 else one(idxs, *x)

    return fn


def on_cpu(tree):
    """The oracle runs on the CPU in float64, wherever the op under test runs."""
    return jax.device_put(jax.tree.map(lambda a: np.asarray(a), tree), jax.devices("cpu")[0])


def oracle_jit(fn):
    """Compiles an oracle for the CPU."""
    compiled = quick_jit(fn) if PLATFORM == "cpu" else jax.jit(fn)

    @functools.wraps(fn)
    def call(*args):
        return jax.tree.map(np.asarray, compiled(*on_cpu(args)))

    return call


@functools.cache
def _oracle_first(metric):
    return oracle_jit(lambda idxs, x, ct: jax.vjp(formula(metric, idxs), *x)[1](ct))


@functools.cache
def _oracle_second(metric):
    def inner(idxs, x, ct, v):
        return product(jax.vjp(formula(metric, idxs), *x)[1](ct), v)

    return oracle_jit(jax.grad(inner, (1, 2)))


def oracle_first(metric, x, idxs, ct):
    """Gradients of ⟨ct, outputs⟩ in every argument, by name. Outputs missing in ``ct`` have cotangent 0."""
    x = tuple(wide(x))
    ct = _dense(ct, OUTPUTS, oracle_values(metric, x, idxs))
    return dict(zip(ARGUMENTS[metric], _oracle_first(metric)(idxs, x, ct), strict=True))


def oracle_second(metric, x, idxs, ct, v):
    """Gradients of ⟨v, gradients of ⟨ct, outputs⟩⟩: in every argument and in every cotangent, by name."""
    x = tuple(wide(x))
    ct = _dense(ct, OUTPUTS, oracle_values(metric, x, idxs))
    v = _dense(v, ARGUMENTS[metric], x)
    of_x, of_ct = _oracle_second(metric)(idxs, x, ct, v)
    return dict(zip((*ARGUMENTS[metric], *OUTPUTS), (*of_x, *of_ct), strict=True))


def oracle_moving(metric, x, idxs, ct, v, v_ct):
    """Tangents of ``oracle_first`` along v and, in the cotangents, v_ct; those along v are second derivatives."""
    along_x, along_ct = oracle_second(metric, x, idxs, ct, v), oracle_first(metric, x, idxs, v_ct)
    return {name: along_x[name] + along_ct[name] for name in ARGUMENTS[metric]}


def _dense(some, names, like):
    return tuple(
        wide(some[name]) if name in some else np.zeros(np.shape(a)) for name, a in zip(names, like, strict=True)
    )


# ---- The same derivatives of the op under test: what is not named stays out of the differentiation


def first(metric, op, x, ct, wrt=None):
    """As ``oracle_first``, for the arguments in ``wrt`` and the outputs in ``ct`` alone."""
    names = ARGUMENTS[metric]
    wrt = names if wrt is None else wrt

    def some(*moving):
        given = dict(zip(wrt, moving, strict=True))
        y = dict(zip(OUTPUTS, op(*(given.get(n, a) for n, a in zip(names, x, strict=True))), strict=True))
        return {name: y[name] for name in ct}

    bars = jax.vjp(some, *(x[names.index(n)] for n in wrt))[1](ct)
    return dict(zip(wrt, bars, strict=True))


def second(metric, op, x, ct, v, wrt=None, wrt_ct=None):
    """As ``oracle_second``, for the arguments in ``wrt`` and the cotangents in ``wrt_ct`` alone."""
    names = ARGUMENTS[metric]
    wrt = names if wrt is None else wrt
    wrt_ct = tuple(ct) if wrt_ct is None else wrt_ct

    def inner(moving, ct_moving):
        z = tuple(moving.get(n, a) for n, a in zip(names, x, strict=True))
        return product(first(metric, op, z, {**ct, **ct_moving}, tuple(v)), v)

    bars = jax.grad(inner, (0, 1))({n: x[names.index(n)] for n in wrt}, {n: ct[n] for n in wrt_ct})
    return {**bars[0], **bars[1]}


def moving(metric, op, x, ct, v, v_ct, wrt=None):
    """As ``oracle_moving``, forward over reverse, for the arguments in ``wrt`` and the outputs in ``ct`` alone."""
    names = ARGUMENTS[metric]

    def bars(x_moving, ct_moving):
        z = tuple(x_moving.get(n, a) for n, a in zip(names, x, strict=True))
        return first(metric, op, z, {**ct, **ct_moving}, wrt)

    return jax.jvp(bars, ({n: x[names.index(n)] for n in v}, {n: ct[n] for n in v_ct}), (v, v_ct))[1]


def turned(ct):
    """Other cotangents of the same shapes."""
    return {name: a[..., ::-1] for name, a in ct.items()}


@functools.cache
def jitted_derivatives(metric, K, implementation, jit=quick_jit, **options):
    """Values, first and second derivatives, and forward over reverse along v and turned(ct), in one compilation."""
    op = outputs(metric, K, implementation, **options)

    def every(x, ct, v):
        out = aggregate(metric, x, K, implementation=implementation, **options)
        moved = moving(metric, op, x, ct, v, turned(ct))
        return out, first(metric, op, x, ct), second(metric, op, x, ct, v), moved

    return jit(every)


def product(a, b):
    """⟨a, b⟩ over whole trees, in the widest dtype of theirs."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(jnp.sum(m.astype(widest(m)) * n.astype(widest(m))) for m, n in pairs)


def widest(a):
    return jnp.float64 if a.dtype == jnp.float64 else jnp.float32


def total(outs, seed=0.0):
    """A nonlinear scalar of the three outputs, in which each has its own cotangent."""
    f_out, w, dists = outs[:3]
    dists = jnp.where(jnp.isfinite(dists), dists, 0.0)
    return jnp.sum(jnp.sin(f_out + seed)) + 0.7 * jnp.sum(jnp.cos(w + seed)) + 0.3 * jnp.sum(jnp.tanh(dists + seed))


def eikonal(op):
    """Loss of the gradient of a field: the inner gradient is in q alone, the loss depends on every argument."""

    def loss(*x):
        def field(q):
            f_out, w, dists = op(q, *x[1:])
            dists = jnp.where(jnp.isfinite(dists), dists, 0.0)
            y = jnp.tanh(f_out).sum(-1) + 0.5 * jnp.sin(w).sum(-1) + 0.1 * jnp.tanh(dists).sum(-1)
            return y.sum(), y

        g, y = jax.grad(field, has_aux=True)(x[0])
        return jnp.mean((jnp.sqrt(jnp.sum(g * g, -1) + 0.1) - 1) ** 2) + jnp.mean(y**2)

    return loss


# ---- Clouds


def cloud(rng, metric, Q, P, F, *, batch=(), dtype=np.float64, kind="plain"):
    """Random arguments, as NumPy arrays, with queries at |dist| of a few of some point.

    kind:
      plain: R not orthonormal, moderate sigma.
      rotation, general: sigma ratios of 1e4 within each point, R orthonormal or any.
      shifted: plain, moved by 100 times the size of the cloud.
      signed: positive, zero and negative sigma.
    """
    scale = 1.0 if P < 8 else P ** (1 / 3)
    p = rng.uniform(-1, 1, (*batch, P, 3))
    f = rng.normal(size=(*batch, P, F))
    if kind in ("rotation", "general"):
        exponents = rng.permuted(np.broadcast_to([-2.0, 0.0, 2.0], (*batch, P, 3)), axis=-1)
        sigma = scale**2 * 10**exponents * rng.uniform(0.5, 1.5, (*batch, P, 1))
    elif kind == "signed":
        sigma = rng.choice([-0.05, 0.0, 1.0, scale**2], (*batch, P, 3)) * rng.uniform(0.2, 1.0, (*batch, P, 3))
    else:
        sigma = scale**2 * rng.uniform(0.2, 1.0, (*batch, P, 3))
    left, right = np.linalg.qr(rng.normal(size=(2, *batch, P, 3, 3)))[0]
    # Singular values are bounded: next to a singular R a query may lie anywhere, and one outlier rules every norm.
    R = left if kind == "rotation" else (left * rng.uniform(0.3, 2.0, (*batch, P, 1, 3))) @ right
    if metric == "iso":
        sigma = sigma[..., :1]
    # A query lies off some point by a standard normal in that point's own units.
    j = rng.integers(0, P, (*batch, Q))
    take = functools.partial(np.take_along_axis, axis=len(batch))
    step = rng.normal(size=(*batch, Q, 3))
    step /= np.maximum(1, np.linalg.norm(step, axis=-1, keepdims=True) / 3.5)
    if kind == "signed":
        step *= 0.5 / scale
    elif metric == "iso":
        step /= np.sqrt(take(sigma, j[..., None]))
    else:
        step /= np.sqrt(take(sigma, j[..., None]))
        step = np.linalg.solve(take(R, j[..., None, None]), step[..., None])[..., 0] if Q else step
    q = take(p, j[..., None]) + step
    if kind == "shifted":
        q, p = q + 200.0, p + 200.0
    x = (q, p, f, sigma, R)[: len(ARGUMENTS[metric])]
    return tuple(a.astype(dtype) for a in x)


def integer_cloud(rng, metric, Q, P, F, *, dtype=np.float64, copies=False, flat=False):
    """Small integers: every distance is exact in any order of evaluation, and most distances tie with others."""
    p = rng.integers(-2, 3, (P, 3))
    R = rng.integers(-1, 2, (P, 3, 3))
    sigma = rng.integers(-1, 4, (P, 3))
    f = rng.integers(-3, 4, (P, F))
    if flat:
        p[:, 2] = 0
    if copies:  # exact duplicates, far apart in the order
        half = P // 2
        for a in (p, R, sigma, f):
            a[P - half :] = a[:half]
    q = rng.integers(-2, 3, (Q, 3))
    x = (q, p, f, sigma, R) if metric == "aniso" else (q, p, f, np.abs(sigma[:, :1]))
    return tuple(a.astype(dtype) for a in x)


def problem(rng, metric, *, Q, P, F, K, batch=(), **options):
    """x, idxs, ct and v of a random cloud."""
    x = tree(cloud(rng, metric, Q, P, F, batch=batch, **options))
    return (x, oracle_search(metric, x, K), *tree(cotangents(rng, metric, x, K)))


def cotangents(rng, metric, x, K, dtype=None):
    """Random cotangents of all outputs and tangents of all arguments, by name."""
    dtype = x[0].dtype if dtype is None else dtype
    q, f = x[0], x[2]
    shapes = {"f_out": (*q.shape[:-1], f.shape[-1]), "w_out": (*q.shape[:-1], K), "dists": (*q.shape[:-1], K)}
    ct = {name: rng.normal(size=s).astype(f.dtype if name == "f_out" else dtype) for name, s in shapes.items()}
    v = {name: rng.normal(size=a.shape).astype(a.dtype) for name, a in zip(ARGUMENTS[metric], x, strict=True)}
    return ct, v


def tree(a):
    """NumPy to JAX arrays, as jax.grad asks."""
    return jax.tree.map(jnp.asarray, a)


# ---- Export


def through_bytes(fn, shapes, platforms=None):
    """``fn`` exported for some platforms, or this one, and read again; it calls no target but ours."""
    if platforms and PLATFORM not in platforms:
        pytest.skip(f"the artifact for {platforms} does not run on {PLATFORM}")
    pytest.importorskip("flatbuffers")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in jka.FFI_TARGETS]
    exported = jax.export.export(jax.jit(fn), platforms=platforms, disabled_checks=checks)(*shapes)
    read = jax.export.deserialize(bytearray(exported.serialize()))
    assert set(re.findall(r"custom_call @(jax_knn_aggregate\.\w+)", str(read.mlir_module()))) <= set(jka.FFI_TARGETS)
    return read


# ---- Comparisons


def assert_close(got, want, tolerance, what=""):
    """‖got − want‖ ≤ tolerance·‖want‖ over the whole array, with NaN and infinities in the same places."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    got, want = got.astype(np.float64), want.astype(np.float64)
    for kind, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        at = np.argwhere(test(got) != test(want))
        assert not len(at), f"{what}: {kind} in different places, first at {at[0]}, {len(at)} of {got.size}"
    finite = np.isfinite(want)
    scale = np.abs(want[finite]).max(initial=0) or 1  # squares of what is tested may overflow
    norm = np.linalg.norm(want[finite] / scale)
    error = np.linalg.norm(got[finite] / scale - want[finite] / scale)
    if not error <= tolerance * norm:
        worst = np.unravel_index(np.argmax(np.where(finite, np.abs(np.where(finite, got - want, 0)), 0)), got.shape)
        raise AssertionError(
            f"{what}: relative error {error / norm if norm else np.inf:.2e} > {tolerance:.0e}, "
            f"norm {norm * scale:.3e}; worst at {tuple(map(int, worst))}: {got[worst]!r}, expected {want[worst]!r}"
        )


def assert_trees_close(got, want, tolerance, what=""):
    paths = jax.tree_util.tree_leaves_with_path(got)
    wants = jax.tree.leaves(want)
    assert len(paths) == len(wants), f"{what}: {len(paths)} leaves, expected {len(wants)}"
    for (path, g), w in zip(paths, wants, strict=True):
        assert_close(g, w, tolerance, f"{what}{jax.tree_util.keystr(path)}")


def distance_tolerance(metric, x):
    """(Q, P): by how much float64 distances may differ where two implementations disagree about the order.

    1e-5 (float32) or 1e-13 (float64) of the distance; where terms cancel, a bound on the rounding of the formula.
    """
    eps = np.finfo(np.asarray(x[0]).dtype).eps
    q, p, _, sigma, *R = wide(x)
    with np.errstate(all="ignore"):
        dists = np.abs(pair_distances(metric, wide(x)))
        d = np.abs(q[:, None] - p[None])
        if metric == "iso":
            bound = 4 * eps * (d * d).sum(-1)
        else:
            u = np.abs((R[0] * (q[:, None] - p[None])[..., None, :]).sum(-1))
            error = 3 * eps * (np.abs(R[0]) * d[..., None, :]).sum(-1)
            bound = (np.abs(sigma) * (2 * u * error + error * error + 3 * eps * u * u)).sum(-1)
    relative = 1e-5 if eps > 1e-10 else 1e-13
    return np.maximum(relative * dists, 2 * bound) + np.finfo(np.asarray(x[0]).dtype).tiny


def assert_neighbours(metric, x, got, want, what=""):
    """Two answers to one search may differ only where float64 distances nearly tie. Without batch axis."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == np.int32, f"{what}: idxs are {got.dtype}"
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    P = np.shape(x[1])[0]
    assert got.size == 0 or (got.min() >= -1 and got.max() < P), f"{what}: indices out of range"
    np.testing.assert_array_equal(got == -1, want == -1, err_msg=f"{what}: empty slots")
    for row in got:
        chosen = row[row >= 0]
        assert len(np.unique(chosen)) == len(chosen), f"{what}: a neighbour twice in {row}"
    rows, slots = np.nonzero(got != want)
    if not len(rows):
        return
    dists, tolerance = pair_distances(metric, wide(x)), distance_tolerance(metric, x)
    g, w = got[rows, slots], want[rows, slots]
    difference = np.abs(dists[rows, g] - dists[rows, w])
    allowed = np.maximum(tolerance[rows, g], tolerance[rows, w])
    bad = np.flatnonzero(~(difference <= allowed))
    assert not len(bad), (
        f"{what}: {len(bad)} slots with other neighbours, first in row {rows[bad[0]]}, slot {slots[bad[0]]}: "
        f"{g[bad[0]]} at {dists[rows, g][bad[0]]!r}, expected {w[bad[0]]} at {dists[rows, w][bad[0]]!r}"
    )


# ---- What a computation consists of

_COLLECTIVES = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast"


def collectives(jitted, *args):
    """The collectives of the compiled program, as a list of (kind, shapes of its results)."""
    text = jitted.lower(*args).compile().as_text()
    found = re.findall(rf"= (.*?) ({_COLLECTIVES})(?:-done)?\(", text)
    dims = [re.findall(r"[a-z]+\d*\[([\d,]*)\]", results) for results, _ in found]
    return [
        (kind, [tuple(map(int, filter(None, d.split(",")))) for d in ds])
        for (_, kind), ds in zip(found, dims, strict=True)
    ]


def kinds(jitted, *args):
    return {kind for kind, _ in collectives(jitted, *args)}


def place(mesh, x, specs):
    return tuple(jax.device_put(a, jax.sharding.NamedSharding(mesh, s)) for a, s in zip(x, specs, strict=True))


def equations(jaxpr):
    """All equations of a jaxpr, those of inner jaxprs too."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda a: hasattr(a, "eqns") or hasattr(a, "jaxpr")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(value)


def primitives(fn, *args):
    """How often each of the package's primitives occurs when ``fn`` is traced, under jit's dead code elimination."""
    names = [e.primitive.name for e in equations(jax.make_jaxpr(jax.jit(fn))(*args))]
    ours = [n for n in names if n.startswith(("aniso_", "iso_"))]
    return {n: ours.count(n) for n in sorted(set(ours))}
