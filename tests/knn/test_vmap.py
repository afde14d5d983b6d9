"""vmap of any subset of the arguments along any axis, nested, mixed with derivatives; what is shared stays shared."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_knn_aggregate as jka

N, Q, P, F, K = 3, 5, 8, 2, 3
NAMES = helpers.ARGUMENTS["aniso"]


def values_and_derivatives(x, ct, implementation, **options):
    """What is mapped: values, gradients of every argument, and gradients of an Eikonal loss."""
    op = helpers.outputs("aniso", K, implementation, **options)
    out = helpers.aggregate("aniso", x, K, implementation=implementation, **options)
    return out, helpers.first("aniso", op, x, ct), jax.grad(helpers.eikonal(op), range(5))(*x)


def stacked_problem(rng, mapped, batch=(), n=N):
    """Arguments with a leading axis of size n on those that are mapped."""
    x = helpers.cloud(rng, "aniso", Q, P, F, batch=(n, *batch))
    ct, _ = helpers.cotangents(rng, "aniso", x, K)
    return tuple(a if name in mapped else a[0] for name, a in zip(NAMES, x, strict=True)), ct


def at(x, mapped, i):
    return tuple(a[i] if name in mapped else a for name, a in zip(NAMES, x, strict=True))


@functools.cache
def unmapped(implementation):
    return helpers.quick_jit(lambda x, ct: values_and_derivatives(x, ct, implementation))


def loop(x, mapped, ct, implementation):
    """The same without vmap, one after the other."""
    rows = [unmapped(implementation)(at(x, mapped, i), jax.tree.map(lambda a, i=i: a[i], ct)) for i in range(N)]
    return jax.tree.map(lambda *a: np.stack(a), *rows)


@pytest.mark.parametrize(
    "mapped",
    [("q",), ("p",), ("f",), ("sigma", "R"), ("q", "f"), ("p", "f", "sigma", "R"), NAMES],
    ids="+".join,
)
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(mapped=[("p",), ("f",), ("sigma", "R")])
def test_any_subset(mapped, implementation, rng):
    """One result for each item, and along an axis that need not be the first."""
    x, ct = stacked_problem(rng, mapped)
    want = loop(x, mapped, ct, implementation)
    axes = [int(rng.integers(-a.ndim, a.ndim)) if n in mapped else None for n, a in zip(NAMES, x, strict=True)]
    moved = tuple(a if axis is None else np.moveaxis(a, 0, axis) for a, axis in zip(x, axes, strict=True))
    fn = jax.vmap(lambda x, ct: values_and_derivatives(x, ct, implementation), in_axes=(tuple(axes), 0))
    got = helpers.quick_jit(fn)(moved, ct)
    np.testing.assert_array_equal(got[0].idxs, want[0].idxs, err_msg=f"axes {axes}")
    helpers.assert_trees_close(got, want, 1e-9, f"axes {axes}: ")


@pytest.mark.thorough_if(implementation="xla")
def test_out_axes_and_eager(implementation, rng):
    x, _ = stacked_problem(rng, NAMES)
    fn = jax.vmap(lambda *x: jka.knn_aggregate_aniso(*x, K, implementation=implementation), out_axes=-1)
    got = fn(*x)
    for i in range(N):
        want = jka.knn_aggregate_aniso(*at(x, NAMES, i), K, implementation=implementation)
        np.testing.assert_array_equal(got.idxs[..., i], want.idxs)
        helpers.assert_close(got.f_out[..., i], want.f_out, 1e-12)


@pytest.mark.thorough_if(implementation="xla")
def test_nested(implementation, rng):
    """Three maps with different operands each, over an op with a batch axis: 2·3·2·2 calls in one."""
    B = 2
    x = helpers.cloud(rng, "aniso", Q, P, F, batch=(B,))
    q = jnp.asarray(x[0] + 0.1 * rng.normal(size=(2, 3, *x[0].shape)))  # axes a, b
    p = jnp.asarray(x[1] + 0.1 * rng.normal(size=(2, *x[1].shape)))  # axis c
    f = jnp.asarray(rng.normal(size=(2, *x[2].shape)))  # axis a
    sigma, R = map(jnp.asarray, x[3:])

    def one(q, p, f):
        def fn(q, p, f, sigma):
            return helpers.total(jka.knn_aggregate_aniso(q, p, f, sigma, R, K, implementation=implementation))

        return jax.value_and_grad(fn, (0, 1, 2, 3))(q, p, f, sigma)

    over_c = jax.vmap(one, (None, 0, None))
    over_b = jax.vmap(over_c, (0, None, None))
    got = helpers.quick_jit(jax.vmap(over_b, (0, None, 0)))(q, p, f)
    single = helpers.quick_jit(one)
    want = [[[single(q[a, b], p[c], f[a]) for c in range(2)] for b in range(3)] for a in range(2)]
    leaves = [jax.tree.leaves(w) for row in want for col in row for w in col]
    want = [np.stack(leaf).reshape(2, 3, 2, *leaf[0].shape) for leaf in zip(*leaves, strict=True)]
    helpers.assert_trees_close(jax.tree.leaves(got), want, 1e-10)


@pytest.mark.parametrize("mapped, wrt", [(("q", "f"), NAMES), (("q", "f"), ("p", "R")), (("f",), ("q", "sigma"))])
@pytest.mark.thorough_if(implementation="xla")
@pytest.mark.thorough_if(wrt=[("p", "R")])
def test_gradients_of_shared_operands_are_summed(mapped, wrt, implementation, rng):
    """grad of a vmap: what every item shares gets the sum of what the items would give it."""
    x, _ = stacked_problem(rng, mapped)
    op = helpers.outputs("aniso", K, implementation)
    axes = tuple(0 if n in mapped else None for n in NAMES)

    def losses(*x):
        return helpers.total(op(*x)) + helpers.eikonal(op)(*x)

    wanted = [NAMES.index(n) for n in wrt]

    def moved(loss):  # forward over reverse: what is shared moves alike for every item
        return lambda *x: jax.jvp(jax.grad(loss, wanted), x, tuple(jnp.cos(a) for a in x))[1]

    for name, transform, loss in (
        ("reverse", lambda loss: jax.grad(loss, wanted), losses),
        ("forward over reverse", moved, lambda *x: helpers.total(op(*x))),
    ):
        got = helpers.quick_jit(transform(lambda *x, loss=loss: jax.vmap(loss, axes)(*x).sum()))(*x)
        single = helpers.quick_jit(transform(loss))
        rows = [single(*at(x, mapped, i)) for i in range(N)]
        for n, bar, *each in zip(wrt, got, *rows, strict=True):
            helpers.assert_close(bar, np.stack(each) if n in mapped else np.sum(each, 0), 1e-9, f"{name}, {n}")


@pytest.mark.thorough_if(implementation="xla")
def test_shared_points_of_a_batched_op(implementation, rng):
    """vmap of q over 3 scenes, with p (2, P, 3) shared: 6 scenes of queries against 2 clouds."""
    B = 2
    x = helpers.cloud(rng, "aniso", Q, P, F, batch=(B,))
    q = jnp.asarray(x[0] + 0.1 * rng.normal(size=(N, *x[0].shape)))
    rest = helpers.tree(x[1:])
    op = helpers.outputs("aniso", K, implementation)

    def loss(q, rest):
        return helpers.total(op(q, *rest)) + helpers.eikonal(op)(q, *rest)

    def mapped(q, rest):
        return jax.vmap(loss, (0, None))(q, rest).sum()

    got = helpers.quick_jit(jax.value_and_grad(mapped, (0, 1)))(q, rest)
    single = helpers.quick_jit(jax.value_and_grad(loss, (0, 1)))
    rows = [single(q[i], rest) for i in range(N)]
    want = (
        sum(r[0] for r in rows),
        (np.stack([r[1][0] for r in rows]), jax.tree.map(lambda *a: np.sum(a, 0), *(r[1][1] for r in rows))),
    )
    helpers.assert_trees_close(got, want, 1e-9)


@pytest.mark.thorough_if(implementation="xla")
def test_per_item_gradients_of_shared_operands(implementation, rng):
    """vmap of a gradient in an operand that is not mapped: one gradient for each item, not their sum."""
    x, _ = stacked_problem(rng, ("q",))
    fn = jax.grad(
        lambda q, *rest: helpers.total(helpers.aggregate("aniso", (q, *rest), K, implementation=implementation)),
        range(1, 5),
    )
    got = helpers.quick_jit(jax.vmap(fn, (0, None, None, None, None)))(*x)
    single = helpers.quick_jit(fn)
    want = jax.tree.map(lambda *a: np.stack(a), *(single(x[0][i], *x[1:]) for i in range(N)))
    helpers.assert_trees_close(got, want, 1e-10)


@pytest.mark.thorough_if(implementation="xla")
def test_mapped_tangents_and_cotangents(implementation, rng):
    """Only the direction is mapped, as in jacfwd and jacrev; first and second order."""
    x = helpers.tree(helpers.cloud(rng, "aniso", Q, P, F))
    op = helpers.outputs("aniso", K, implementation)
    many = [helpers.tree(helpers.cotangents(rng, "aniso", x, K)) for _ in range(N)]
    cts, vs = jax.tree.map(lambda *a: jnp.stack(a), *many)

    def pull(ct):
        return helpers.first("aniso", op, x, ct)

    def push(v):
        return jax.jvp(op, x, tuple(v[n] for n in NAMES))[1]

    def both(ct, v):
        return helpers.second("aniso", op, x, ct, v)

    def moved(ct, v):  # vjp_jvp
        return helpers.moving("aniso", op, x, ct, v, helpers.turned(ct))

    ct, v = many[0]
    cases = {
        "vjp along ct": (pull, (cts,)),
        "jvp along v": (push, (vs,)),
        "vjp_jvp along v": (lambda v: moved(ct, v), (vs,)),
        "vjp_jvp along both": (moved, (cts, vs)),
        "vjp_vjp along both": (both, (cts, vs)),
        "vjp_vjp along v": (lambda v: both(ct, v), (vs,)),
        "vjp_vjp along ct": (lambda ct: both(ct, v), (cts,)),
    }
    for name, (fn, args) in cases.items():
        got = helpers.quick_jit(jax.vmap(fn))(*args)
        single = helpers.quick_jit(fn)
        rows = [single(*jax.tree.map(lambda a, i=i: a[i], args)) for i in range(N)]
        helpers.assert_trees_close(got, jax.tree.map(lambda *a: np.stack(a), *rows), 1e-10, f"{name}: ")


@pytest.mark.thorough_if(implementation="xla")
def test_isotropic(implementation, rng):
    x = helpers.cloud(rng, "iso", Q, P, F, batch=(N,))
    x = helpers.tree((x[0], x[1][0], x[2], x[3][0]))
    op = helpers.outputs("iso", K, implementation)

    def fn(*x):
        return op(*x), jax.grad(lambda *x: helpers.total(op(*x)) + helpers.eikonal(op)(*x), range(4))(*x)

    got = helpers.quick_jit(jax.vmap(fn, (0, None, 0, None)))(*x)
    single = helpers.quick_jit(fn)
    want = jax.tree.map(lambda *a: np.stack(a), *(single(x[0][i], x[1], x[2][i], x[3]) for i in range(N)))
    helpers.assert_trees_close(got, want, 1e-9)


@pytest.mark.thorough_if(implementation="xla")
def test_integer_arguments(implementation, rng):
    """Tables, indices and lengths may be mapped, also where nothing else is."""
    x = helpers.cloud(rng, "aniso", Q, P, F)
    y = (*x[:3], x[3][:, :1])
    options = {"implementation": implementation}
    calls = [
        lambda n, t, i: jka.knn_aggregate_aniso(*x, K, p_lengths=n, **options),
        lambda n, t, i: jka.knn_aggregate_aniso_lookup(*x, t, K, **options),
        lambda n, t, i: jka.knn_aggregate_aniso_precomputed(*x, i, **options),
        lambda n, t, i: jka.knn_aggregate_precomputed(*y, i, **options),
        lambda n, t, i: jka.knn_search(x[0], x[1], K, p_lengths=n, **options),
    ]
    lengths, tables = np.array([0, 2, P]), rng.integers(-1, P, (P, K, N))
    idxs = rng.integers(-1, P, (Q, N, K))
    got = helpers.quick_jit(lambda *given: [jax.vmap(call, (0, -1, 1))(*given) for call in calls])(
        lengths, tables, idxs
    )
    single = helpers.quick_jit(lambda *given: [call(*given) for call in calls])
    for i in range(N):
        for batched, want in zip(got, single(lengths[i], tables[..., i], idxs[:, i]), strict=True):
            np.testing.assert_array_equal(batched.idxs[i], want.idxs)
            helpers.assert_trees_close(jax.tree.map(lambda a, i=i: np.asarray(a)[i], batched), want, 1e-12)
    table = jax.vmap(lambda p: jka.build_knn_table(p, K, **options))(np.stack([x[1], -x[1]]))
    np.testing.assert_array_equal(table[0], table[1])


@pytest.mark.thorough_if(implementation="xla")
def test_what_never_changes_the_result(implementation, rng):
    """Guesses and indexes may be mapped where nothing else is: the result repeats along the mapped axis."""
    x = helpers.cloud(rng, "aniso", Q, P, F)
    want = helpers.oracle("aniso", x, K)
    guesses = rng.integers(-1, P, (Q, N, 2))
    index = jka.build_index(x[1], x[3], x[4], implementation=implementation)
    indexes = jax.tree.map(lambda a: jnp.stack([a] * N), index)

    def op(warm, index):
        return jka.knn_aggregate_aniso(*x, K, warm_idxs=warm, index=index, implementation=implementation)

    calls = {
        "guesses": jax.vmap(lambda w: op(w, None), in_axes=1)(guesses),
        "indexes": jax.vmap(lambda i: op(None, i))(indexes),
        "both, nested": jax.vmap(lambda w: jax.vmap(lambda i: op(w, i))(indexes), in_axes=1)(guesses),
    }
    for name, got in calls.items():
        lead = got.idxs.shape[:-2]
        assert lead == ((N, N) if "nested" in name else (N,)), f"{name}: {got.idxs.shape}"
        np.testing.assert_array_equal(got.idxs, np.broadcast_to(want[3], (*lead, Q, K)), err_msg=name)
        wide = tuple(np.broadcast_to(a, (*lead, *a.shape)) for a in want[:3])
        helpers.assert_trees_close(tuple(got)[:3], wide, 1e-12, f"{name}: ")


# ---- Nothing is copied


def operand_shapes(fn, *args):
    """Name of each of the package's primitives -> shapes of its operands."""
    return [
        (e.primitive.name, [v.aval.shape for v in e.invars])
        for e in helpers.equations(jax.make_jaxpr(fn)(*args))
        if e.primitive.name.startswith(("aniso_", "iso_"))
    ]


def test_unmapped_operands_enter_primitives_with_size_one(rng):
    """Shared arrays get an axis of size 1, in every primitive of an Eikonal step over 7 scenes."""
    n = 7
    x = helpers.cloud(rng, "aniso", Q, P, F, batch=(n,))
    x = helpers.tree((x[0], *(a[0] for a in x[1:])))
    loss = jax.grad(helpers.eikonal(helpers.outputs("aniso", K, None)))
    fn = jax.vmap(loss, (0, None, None, None, None))
    seen = operand_shapes(fn, *x)
    assert {name for name, _ in seen} >= {"aniso_search", "aniso_value", "aniso_vjp", "aniso_vjp_vjp"}
    for name, shapes in seen:
        start = 2 if name == "aniso_search" else 5
        for shape, a in zip(shapes[1:start] if name != "aniso_search" else [shapes[1]], x[1:], strict=False):
            assert shape == (1, *a.shape), f"{name} takes an operand of shape {shape}, expected {(1, *a.shape)}"
        assert shapes[0] == (n, Q, 3)


def test_unmapped_operands_enter_kernels_uncopied(kernels, rng):
    """The custom calls themselves: no shared array appears with the size of the mapped axis."""
    n, P = 7, 11  # sizes that occur nowhere else
    x = helpers.cloud(rng, "aniso", Q, P, F, batch=(n,))
    x = helpers.tree((x[0], *(a[0] for a in x[1:])))
    for transform in (lambda f: f, lambda f: jax.grad(lambda *x: f(*x).sum(), range(5))):
        loss = helpers.eikonal(helpers.outputs("aniso", K, "ffi"))
        text = jax.jit(transform(jax.vmap(loss, (0, None, None, None, None)))).lower(*x).as_text()
        calls = [line for line in text.splitlines() if "custom_call @jax_knn_aggregate." in line]
        assert calls
        for line in calls:
            operands = line.rsplit(" : (", 1)[1].split(") -> ")[0]
            for copied in (f"{n}x{P}x3x", f"{n}x{P}x{F}x", f"{n}x{P}x3x3x"):
                assert f"tensor<{copied}f64" not in operands, f"{line.split('(')[0]} takes a copied operand: {operands}"
