"""What users get wrong: each error names the argument, what was got and what was expected."""

import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_knn_aggregate as jka

B, Q, P, F, K = 2, 4, 6, 3, 2


def arguments(metric="aniso", batch=(B,)):
    return dict(
        zip(
            helpers.ARGUMENTS[metric],
            helpers.cloud(np.random.default_rng(0), metric, Q, P, F, batch=batch, dtype=np.float32),
            strict=True,
        )
    )


def fails(error, words, fn, *args, **kwargs):
    """``fn`` raises ``error`` with all of ``words``, eagerly and while it is traced."""
    for call in (functools.partial(fn, *args, **kwargs), lambda: jax.eval_shape(lambda: fn(*args, **kwargs))):
        with pytest.raises(error) as caught:
            call()
        message = str(caught.value)
        for word in words:
            assert word in message, f"{message!r} does not mention {word!r}"


def ops(a):
    """Every entry point that takes these arguments, with K where it has one."""
    x = tuple(a.values())
    q, p, f, sigma, R = x
    table = np.zeros((P, 4), np.int32)
    idxs = np.zeros((*np.shape(q)[:-1], K), np.int32)
    return {
        "aniso": lambda K=K, **o: jka.knn_aggregate_aniso(*x, K, **o),
        "lookup": lambda K=K, **o: jka.knn_aggregate_aniso_lookup(*x, table, K, **o),
        "precomputed": lambda K=K, **o: jka.knn_aggregate_aniso_precomputed(*x, idxs, **o),
        "precomputed iso": lambda K=K, **o: jka.knn_aggregate_precomputed(q, p, f, sigma[..., :1], idxs, **o),
        "iso": lambda K=K, **o: jka.knn_aggregate(q, p, f, sigma[..., :1], K, **o),
        "search": lambda K=K, **o: jka.knn_search_aniso(q, p, sigma, R, K, **o),
        "search iso": lambda K=K, **o: jka.knn_search(q, p, K, **o),
        "table": lambda K=K, **o: jka.build_knn_table(p, K, **o),
    }


ENTRY_POINTS = tuple(ops(arguments()))
WITH_K = tuple(n for n in ENTRY_POINTS if not n.startswith("precomputed"))


@pytest.mark.parametrize("name", WITH_K)
def test_K_out_of_range(name):
    op = ops(arguments())[name]
    limit = 4 if name == "lookup" else P
    for bad in (0, -1, limit + 1, 10**12):
        what = "the width of knn_table" if name == "lookup" else "the number of points"
        fails(ValueError, [f"K is {bad}", f"1 <= K <= {limit}", what], op, bad)
    op(limit)


@pytest.mark.parametrize("name", WITH_K)
def test_K_not_an_integer(name):
    op = ops(arguments())[name]
    for bad in (2.0, "2", None, True, np.ones(2, np.int32), np.float32(2)):
        fails(TypeError, ["K is ", "expected a Python integer"], op, bad)
    with pytest.raises(TypeError, match=r"(?s)K is .*expected a Python integer.*static_argnames"):
        jax.jit(op)(2)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_implementation(name):
    op = ops(arguments())[name]
    for bad in ("cuda", "", 1, False):
        fails(ValueError, [f"implementation is {bad!r}", "None, 'xla', 'ffi'"], op, implementation=bad)


@pytest.mark.parametrize("name", ENTRY_POINTS)
@pytest.mark.thorough_if(name=[n for n in ENTRY_POINTS if n not in ("aniso", "search iso")])
def test_no_kernel_on_the_platform(name):
    """ "ffi" never falls back in silence; None and "xla" lower for a platform without kernels."""
    op = ops(arguments())[name]

    def lower(implementation):
        return jax.jit(lambda: op(implementation=implementation)).trace().lower(lowering_platforms=("tpu",))

    with pytest.raises(NotImplementedError, match=r"implementation='ffi' .*no kernel.*doctor.*implementation=None"):
        lower("ffi")
    assert "custom_call @jax_knn_aggregate" not in lower(None).as_text()
    assert "custom_call @jax_knn_aggregate" not in lower("xla").as_text()


def test_no_kernel_for_derivatives():
    x = tuple(arguments().values())
    idxs = np.zeros((B, Q, K), np.int32)

    def op(*x):
        return jka.knn_aggregate_aniso_precomputed(*x, idxs, implementation="ffi")[:3]

    with pytest.raises(NotImplementedError, match="aniso_value"):
        jax.jit(op).trace(*x).lower(lowering_platforms=("tpu",))
    with pytest.raises(NotImplementedError, match="aniso_v"):
        jax.jit(jax.grad(helpers.eikonal(op), range(5))).trace(*x).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("q", (B, Q, 2), ["q has shape (2, 4, 2)", "(B, Q, 3)", "axis 2 must have size 3"]),
        ("q", (Q,), ["q has shape (4,), expected (Q, 3) or (B, Q, 3)."]),
        ("q", (1, B, Q, 3), ["q has shape (1, 2, 4, 3), expected (Q, 3) or (B, Q, 3)."]),
        ("q", (Q, 3), ["p has shape (2, 6, 3)", "(P, 3)", "because q has shape (4, 3)", "without a batch axis"]),
        ("p", (B, P, 4), ["p has shape (2, 6, 4)", "(B, P, 3)"]),
        ("p", (P, 3), ["p has shape (6, 3)", "(B, P, 3)", "because q has shape (2, 4, 3)", "jax.vmap"]),
        ("p", (B + 1, P, 3), ["p has shape (3, 6, 3)", "B = 2 in q"]),
        ("p", (B, P), ["p has shape (2, 6), expected (B, P, 3)."]),
        ("f", (B, P), ["f has shape (2, 6), expected (B, P, F). Add the last axis: f[:, :, None]."]),
        ("f", (P, F), ["f has shape (6, 3), expected (B, P, F), because q has shape (2, 4, 3)", "jax.vmap"]),
        ("f", (F,), ["f has shape (3,), expected (B, P, F)."]),
        ("f", (B, P + 1, F), ["f has shape (2, 7, 3)", "P = 6 in p", "(2, 6, 3)"]),
        ("sigma", (B, P, 1), ["sigma has shape (2, 6, 1)", "(B, P, 3)"]),
        ("sigma", (B, P - 1, 3), ["sigma has shape (2, 5, 3)", "P = 6 in p"]),
        ("R", (B, P, 9), ["R has shape (2, 6, 9)", "(B, P, 3, 3)"]),
        ("R", (B, P, 3, 4), ["R has shape (2, 6, 3, 4)", "(B, P, 3, 3)"]),
        ("R", (1, P, 3, 3), ["R has shape (1, 6, 3, 3)", "B = 2 in q"]),
    ],
    ids=str,
)
def test_shapes(name, shape, words):
    x = arguments() | {name: np.zeros(shape, np.float32)}
    fails(ValueError, words, jka.knn_aggregate_aniso, **x, K=K)
    fails(ValueError, words, jka.knn_aggregate_aniso_lookup, **x, knn_table=np.zeros((P, K), np.int32), K=K)
    fails(ValueError, words, jka.knn_aggregate_aniso_precomputed, **x, knn_idxs=np.zeros((B, Q, K), np.int32))
    if name != "f":
        del x["f"]
        fails(ValueError, words, jka.knn_search_aniso, **x, K=K)


def test_shapes_isotropic():
    x = arguments("iso")
    wide = x | {"sigma": np.ones((B, P, 3), np.float32)}
    words = ["sigma has shape (2, 6, 3)", "(B, P, 1)"]
    fails(ValueError, words, jka.knn_aggregate, **wide, K=K)
    fails(ValueError, words, jka.knn_aggregate_precomputed, **wide, knn_idxs=np.zeros((B, Q, K), np.int32))
    fails(ValueError, ["p has shape (6,)"], jka.build_knn_table, np.zeros(6, np.float32), 1)
    for batch, axes in (((), ":"), ((B,), ":, :")):
        x = arguments("iso", batch)
        hint = f"{(*batch, P)}, expected {'(B, P, 1)' if batch else '(P, 1)'}. Add the last axis: sigma[{axes}, None]."
        fails(ValueError, ["sigma has shape " + hint], jka.knn_aggregate, **(x | {"sigma": x["sigma"][..., 0]}), K=K)
    fails(ValueError, ["p has shape (6, 2)"], jka.build_knn_table, np.zeros((6, 2), np.float32), 1)


@pytest.mark.parametrize("batch", [(), (B,), (0,)], ids=str)
def test_no_points(batch):
    x = arguments(batch=batch)
    x = {name: a if name == "q" else a[..., :0, :] if name != "R" else a[..., :0, :, :] for name, a in x.items()}
    words = ["p has no points, expected at least one", "p_lengths"]
    for op in ops(x).values():
        fails(ValueError, words, op)
    fails(ValueError, words, jka.build_index, x["p"])
    fails(ValueError, words, jka.build_index, x["p"], x["sigma"], x["R"], implementation="xla")


def test_shapes_of_integers():
    x = arguments()
    for shape in ((Q, K), (B, Q), (B, Q + 1, K), (B + 1, Q, K)):
        fails(
            ValueError,
            [f"knn_idxs has shape {shape}", "(2, 4, K)"],
            jka.knn_aggregate_aniso_precomputed,
            **x,
            knn_idxs=np.zeros(shape, np.int32),
        )
        fails(
            ValueError,
            [f"knn_idxs has shape {shape}", "(2, 4, K)"],
            jka.knn_aggregate_precomputed,
            **arguments("iso"),
            knn_idxs=np.zeros(shape, np.int32),
        )
    for shape in ((P,), (P + 1, K), (B + 1, P, K), (1, B, P, K)):
        fails(
            ValueError,
            [f"knn_table has shape {shape}", "(6, K')", "(2, 6, K')"],
            jka.knn_aggregate_aniso_lookup,
            **x,
            knn_table=np.zeros(shape, np.int32),
            K=K,
        )
    for name in WITH_K:
        for shape in ((), (B + 1,), (B, 1)):
            fails(
                ValueError, [f"p_lengths has shape {shape}", "(2,)"], ops(x)[name], p_lengths=np.zeros(shape, np.int32)
            )
        fails(
            ValueError,
            ["p_lengths has shape (1,)", "()", "scalar"],
            ops(arguments(batch=()))[name],
            p_lengths=np.zeros(1, np.int32),
        )


@pytest.mark.parametrize("name", helpers.ARGUMENTS["aniso"])
def test_dtypes(name):
    x = arguments()
    for bad in (np.int32, np.complex64, np.bool_):
        words = [f"{name} has dtype {np.dtype(bad)}", "expected float32 or float64", "astype"]
        fails(TypeError, words, jka.knn_aggregate_aniso, **(x | {name: x[name].astype(bad)}), K=K)
    other = x | {name: x[name].astype(np.float64)}  # mixed
    blamed = "p" if name == "q" else name
    dtypes = ["float32", "float64"]
    fails(TypeError, [f"{blamed} has dtype", *dtypes, "like q"], jka.knn_aggregate_aniso, **other, K=K)
    for half in (jnp.bfloat16, jnp.float16):
        if name == "f":
            jka.knn_aggregate_aniso(**(x | {"f": x["f"].astype(half)}), K=K)
            wide = {n: a.astype(half if n == "f" else np.float64) for n, a in x.items()}
            fails(TypeError, ["f has dtype", "float64"], jka.knn_aggregate_aniso, **wide, K=K)
        else:
            bad = x | {name: x[name].astype(half)}
            fails(TypeError, [f"{name} has dtype {jnp.dtype(half)}"], jka.knn_aggregate_aniso, **bad, K=K)


def test_types():
    x = arguments()
    for bad in ([[[0.0] * 3] * P] * B, None, 1.0, "p"):
        fails(
            TypeError,
            ["p is a ", type(bad).__name__, "expected a JAX or NumPy array"],
            jka.knn_aggregate_aniso,
            **(x | {"p": bad}),
            K=K,
        )
    for bad in ([[[0] * K] * Q] * B, [[0], [1, 2]], None, "idxs", 1.0):
        words = [f"is a {type(bad).__name__}, expected an integer array", "jnp.asarray"]
        fails(TypeError, ["knn_idxs", *words], jka.knn_aggregate_aniso_precomputed, **x, knn_idxs=bad)
        fails(TypeError, ["knn_table", *words], jka.knn_aggregate_aniso_lookup, **x, knn_table=bad, K=K)
        if bad is not None:
            fails(TypeError, ["warm_idxs", *words], jka.knn_search, x["q"], x["p"], K, warm_idxs=bad)
            fails(TypeError, ["p_lengths", *words], jka.knn_search, x["q"], x["p"], K, p_lengths=bad)


def test_integer_dtypes():
    x = arguments()
    for bad in (np.float32, np.bool_, np.complex64):
        dtype = str(np.dtype(bad))
        fails(
            TypeError,
            ["knn_idxs", dtype, "integer"],
            jka.knn_aggregate_aniso_precomputed,
            **x,
            knn_idxs=np.zeros((B, Q, K), bad),
        )
        fails(
            TypeError,
            ["knn_table", dtype, "integer"],
            jka.knn_aggregate_aniso_lookup,
            **x,
            knn_table=np.zeros((P, K), bad),
            K=K,
        )
        fails(TypeError, ["p_lengths", dtype, "integer"], jka.knn_search, x["q"], x["p"], K, p_lengths=np.zeros(B, bad))
    fails(TypeError, ["p_lengths", "integer"], jka.knn_search, x["q"][0], x["p"][0], K, p_lengths=2.5)
    fails(TypeError, ["p_lengths", "integer"], jka.knn_search, x["q"][0], x["p"][0], K, p_lengths=True)


def test_errors_under_transformations():
    """Shapes are checked as users see them, not with the axes that vmap adds."""
    x = tuple(arguments(batch=()).values())
    bad = (x[0], np.zeros((P, 2), np.float32), *x[2:])
    with pytest.raises(ValueError, match=re.escape("p has shape (6, 2), expected (P, 3)")):
        jax.vmap(lambda q: jka.knn_aggregate_aniso(q, *bad[1:], K))(np.stack([x[0]] * 2))
    with pytest.raises(ValueError, match=re.escape("p has shape (6, 2), expected (P, 3)")):
        jax.grad(lambda q: jka.knn_aggregate_aniso(q, *bad[1:], K).f_out.sum())(jnp.asarray(x[0]))
