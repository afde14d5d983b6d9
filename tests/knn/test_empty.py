"""Every size may be 0, on every axis, alone and in pairs, at every order."""

import functools
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_knn_aggregate as jka

#: Axes that vmap adds: over queries (or weights) alone, over points (or positions) alone, and over everything.
MAPPED = {"S": 2, "T": 3, "B": 2}
KNN = {**MAPPED, "Q": 3, "F": 2, "K": 2}
RAYS = {**MAPPED, "R": 3, "N": 4}


def some_empty(sizes):
    """All sizes, of which one is 0, or, in thorough tests, two."""
    names = [*((a,) for a in sizes), *itertools.combinations(sizes, 2)]
    marks = {1: (), 2: pytest.mark.thorough}
    return [
        pytest.param({**sizes, **dict.fromkeys(some, 0)}, id="+".join(some), marks=marks[len(some)]) for some in names
    ]


def mapped(fn, of_queries, of_points):
    """``fn``, whose first ``of_queries`` arguments have S, the next ``of_points`` T, and all of them B in front."""
    q, p, none = (0,) * of_queries, (0,) * of_points, None
    return jax.vmap(jax.vmap(jax.vmap(fn, (*q, *[none] * of_points)), (*[none] * of_queries, *p)))


def every_order(op):
    """Values, gradients, and gradients' derivatives in both modes, of a function of arrays with a tuple of results."""

    def loss(*x):
        return sum(jnp.sum(jnp.sin(y)) for y in op(*x))

    def all_of_them(*x):
        argnums = range(len(x))
        first = jax.grad(loss, argnums)
        second = jax.grad(lambda *x: sum(jnp.vdot(a, a) for a in first(*x)), argnums)
        return op(*x), jax.jvp(first, x, x), second(*x)

    return all_of_them


def assert_zero(got, what):
    for path, a in jax.tree_util.tree_leaves_with_path(got):
        np.testing.assert_array_equal(a, np.zeros_like(a), err_msg=f"{what}{jax.tree_util.keystr(path)}")


@pytest.mark.parametrize("sizes", some_empty(KNN))
@pytest.mark.thorough_if(sizes={**KNN, "F": 0})  # as in test_semantics.py
def test_aggregate(sizes, kernels, rng):
    S, T, B, Q, F, K = sizes.values()
    P = 5
    core = [(B, S, Q, 3), *((B, T, P, *rest) for rest in ((3,), (F,), (3,), (3, 3)))]
    x = [jnp.asarray(rng.uniform(0.2, 1, shape)) for shape in core]
    idxs = rng.integers(-1, P, (Q, K))

    def op(implementation, *x):
        if K == 0:
            return jka.knn_aggregate_aniso_precomputed(*x, idxs, implementation=implementation)[:3]
        return jka.knn_aggregate_aniso(*x, K, implementation=implementation)[:3]

    def run(implementation):
        return helpers.quick_jit(every_order(mapped(functools.partial(op, implementation), 1, 4)))(*x)

    values, (first, forward), second = run("ffi")
    assert [a.shape for a in values] == [(B, T, S, Q, F), (B, T, S, Q, K), (B, T, S, Q, K)]
    if all(sizes[name] for name in "STBQK"):  # F alone is 0: weights and distances are not empty
        helpers.assert_trees_close((values, (first, forward), second), run("xla"), 1e-9)
    else:
        assert_zero((first, forward, second), "derivatives")


@pytest.mark.parametrize("sizes", some_empty({**MAPPED, "Q": 3}))
@pytest.mark.thorough_if(implementation="xla")
def test_search(sizes, implementation, rng):
    S, T, B, Q = sizes.values()
    P, K = 5, 2
    q, p = jnp.asarray(rng.normal(size=(B, S, Q, 3))), jnp.asarray(rng.normal(size=(B, T, P, 3)))
    options = {"implementation": implementation}

    def every(q, p):
        index = jka.build_index(p, **options)
        found = jka.knn_search(q, p, K, **options)
        warm = jka.knn_search(q, p, K, index=index, warm_idxs=found.idxs, **options)
        return found, warm, index, jka.build_knn_table(p, K, **options)

    found, warm, index, table = helpers.quick_jit(mapped(every, 1, 1))(q, p)
    assert all(a.shape == (B, T, S, Q, K) for a in (*found, *warm)) and table.shape == (B, T, S, P, K)
    assert index.order.shape == (B, T, S, 1, 32)


@pytest.mark.parametrize("name, shared", [("dense", False), ("flat", False), ("dense", True), ("flat", True)])
@pytest.mark.parametrize("sizes", some_empty(RAYS))
@pytest.mark.thorough_if(shared=True)
def test_distortion(sizes, name, shared, kernels, rng):
    S, T, B, R, N = sizes.values()
    w, interval = (jnp.asarray(rng.random((B, S, n))) for n in (R * N, 1 if shared else R * N))
    m = jnp.asarray(np.sort(rng.random((B, T, R * N))))
    ids = np.repeat(np.arange(R), N)

    def op(w, interval, m):
        options = {"reduction": "none", "implementation": "ffi"}
        interval = interval[0] if shared else interval
        if name == "flat":
            return (jka.flatten_distortion_loss(w, m, interval, ids, R, **options),)
        w, m = w.reshape(R, N), m.reshape(R, N)
        return (jka.distortion_loss(w, m, interval if shared else interval.reshape(R, N), **options),)

    (values,), *derivatives = helpers.quick_jit(every_order(mapped(op, 2, 1)))(w, interval, m)
    assert values.shape == (B, T, S, R)
    assert_zero((values, derivatives), "loss and derivatives")


@pytest.mark.parametrize("name", KNN)
@pytest.mark.thorough_if(name=["S", "T", "B", "F", "K"])
def test_third_order(name, kernels, rng):
    S, T, B, Q, F, K = {**KNN, name: 0}.values()
    q = jnp.asarray(rng.normal(size=(B, S, Q, 3)))
    p, f, sigma = (jnp.asarray(rng.random((B, T, 5, n))) for n in (3, F, 1))
    idxs = rng.integers(-1, 5, (Q, K))
    op = mapped(lambda *x: jka.knn_aggregate_precomputed(*x, idxs)[0], 1, 3)
    first = jax.grad(lambda *x: jnp.sum(jnp.sin(op(*x))), range(4))
    second = jax.grad(lambda *x: sum(jnp.vdot(a, a) for a in first(*x)), range(4))
    third = jax.grad(lambda *x: sum(jnp.vdot(a, a) for a in second(*x)), range(4))
    assert_zero(helpers.quick_jit(third)(q, p, f, sigma), "third order")
