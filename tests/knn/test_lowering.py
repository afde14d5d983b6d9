"""Which kernels a computation launches, and what it never holds in memory."""

import math
import re

import helpers
import jax
import jax.numpy as jnp
import pytest

import jax_knn_aggregate as jka
from jax_knn_aggregate.ops.distortion.kernels import DENSE, FLAT
from jax_knn_aggregate.ops.knn import aggregate
from jax_knn_aggregate.ops.knn.metric import ANISOTROPIC, ISOTROPIC

Q, P, F, K = 13, 17, 9, 5
ARGUMENTS = helpers.ARGUMENTS


@pytest.fixture(params=helpers.METRICS)
def problem(request, rng):
    metric = request.param
    return metric, helpers.tree(helpers.cloud(rng, metric, Q, P, F))


def calls(fn, x):
    """How often the lowered module calls each target of the package."""
    text = jax.jit(fn).lower(*x).as_text()
    names = re.findall(r"custom_call @jax_knn_aggregate\.(\w+)", text)
    return {n: names.count(n) for n in set(names)}


def steps(metric, implementation=None):
    op = helpers.outputs(metric, K, implementation)
    every = range(len(ARGUMENTS[metric]))

    def forward_eikonal(q, *rest):  # ∇_q by forward mode
        along = jnp.broadcast_to(jnp.eye(3)[:, None], (3, *q.shape)).astype(q.dtype)
        slopes = jax.vmap(lambda v: jax.jvp(lambda q: helpers.total(op(q, *rest)), (q,), (v,))[1])(along)
        return jnp.sum(slopes**2)

    return {
        "value": op,
        "jvp": lambda *x: jax.jvp(op, x, x),
        "gradient": jax.grad(lambda *x: helpers.total(op(*x)), every),
        "Eikonal": jax.value_and_grad(helpers.eikonal(op), every),
        "Eikonal, ∇_q forward": jax.grad(forward_eikonal, every),
        "Hessian times vector": lambda *x: jax.jvp(jax.grad(lambda *x: helpers.total(op(*x)), every), x, x)[1],
        "the same of a sum": lambda *x: jax.jvp(jax.grad(lambda *x: op(*x)[0].sum(), every), x, x)[1],
    }


WANTED = {
    "value": {"search": 1, "value": 1},
    "jvp": {"search": 1, "value": 1, "jvp": 1},
    "gradient": {"search": 1, "value": 1, "vjp": 1},
    "Eikonal": {"search": 1, "value": 1, "vjp": 2, "vjp_vjp": 1},
    "Eikonal, ∇_q forward": {"search": 1, "value": 1, "jvp": 1, "vjp": 1, "vjp_vjp": 1},
    "Hessian times vector": {"search": 1, "value": 1, "jvp": 1, "vjp": 1, "vjp_jvp": 1},
    "the same of a sum": {"search": 1, "value": 1, "jvp": 1, "vjp": 1, "vjp_jvp": 1},
}
#: What is not used is not lowered: the gradient beside its tangent. Where cotangents stay, vjp_vjp does as much.
LOWERED = WANTED | {
    "Hessian times vector": {"search": 1, "value": 1, "jvp": 1, "vjp_jvp": 1},
    "the same of a sum": {"search": 1, "vjp_vjp": 1},
}


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.thorough_if(problem="iso", name=[n for n in WANTED if n != "Eikonal"])
def test_primitives(name, problem):
    """On every path: derivatives never search again, and need no more than these."""
    metric, x = problem
    for implementation in (None, "xla", "ffi"):
        got = helpers.primitives(steps(metric, implementation)[name], *x)
        assert got == {f"{metric}_{role}": n for role, n in WANTED[name].items()}


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.thorough_if(problem="iso", name=[n for n in WANTED if n != "Eikonal"])
def test_kernels(name, problem, kernels):
    metric, x = problem
    got = calls(steps(metric)[name], x)
    wanted = {f"{metric}_{role}": n for role, n in LOWERED[name].items()}
    assert {n: c for n, c in got.items() if n not in {"invert", f"{metric}_index"}} == wanted
    if name == "Eikonal":
        assert not calls(steps(metric, "xla")[name], x), "implementation='xla' calls kernels"


def test_the_inner_gradient_is_for_queries_alone(problem):
    """The first vjp of an Eikonal step computes one gradient, the second the rest."""
    metric, x = problem
    eqns = helpers.equations(jax.make_jaxpr(jax.jit(steps(metric)["Eikonal"]))(*x))
    wanted = [e.params["masks"].wanted for e in eqns if e.primitive.name == f"{metric}_vjp"]
    queries = tuple(n == "q" for n in ARGUMENTS[metric])
    assert sorted(wanted, key=sum)[0] == queries
    assert len(wanted) == 2


def test_only_queries_moving(problem):
    """What only moves queries asks no kernel for anything of the points."""
    metric, x = problem
    op = helpers.outputs(metric, K)
    eqns = helpers.equations(jax.make_jaxpr(jax.grad(helpers.eikonal(op)))(*x))
    for e in eqns:
        if e.primitive.name == f"{metric}_vjp":
            assert e.params["masks"].wanted == tuple(n == "q" for n in ARGUMENTS[metric])
        if e.primitive.name == f"{metric}_vjp_vjp":
            assert e.params["masks"].wanted[: len(x)] == tuple(n == "q" for n in ARGUMENTS[metric])


def test_kernels_hold_no_array_of_all_pairs_or_features(problem, kernels):
    metric, x = problem
    for name in ("value", "gradient", "Eikonal", "Hessian times vector"):
        text = jax.jit(steps(metric)[name]).lower(*x).as_text()
        # Bytes are scratch space, of at least 2 MiB.
        shapes = [tuple(map(int, s.split("x")[:-1])) for s in re.findall(r"tensor<((?:\d+x)+)(?!ui8)[a-z]", text)]
        for shape in shapes:
            assert math.prod(shape) < Q * K * F, f"{name}: an array of shape {shape}"
            assert not (Q in shape and P in shape), f"{name}: an array of shape {shape}"


def test_entry_points_call_kernels(kernels, rng):
    x = helpers.tree(helpers.cloud(rng, "aniso", Q, P, F))
    q, p, _, sigma, R = x
    table = jka.build_knn_table(p, K)
    idxs = table[:Q]
    for fn, want in {
        lambda *x: jka.knn_search_aniso(q, p, sigma, R, K): {"aniso_search": 1, "aniso_value": 1},
        lambda *x: jka.knn_search(q, p, K): {"iso_search": 1, "iso_value": 1},
        lambda *x: jka.build_knn_table(p, K): {"iso_search": 1},
        lambda *x: jka.knn_aggregate_aniso_lookup(*x, table, K): {"iso_search": 1, "aniso_value": 1},
        lambda *x: jka.knn_aggregate_aniso_precomputed(*x, idxs): {"aniso_value": 1},
        lambda q, p, f, sigma, R: jka.knn_aggregate_precomputed(q, p, f, sigma[:, :1], idxs): {"iso_value": 1},
    }.items():
        # On CPUs every search has an index, on CUDA those of large clouds.
        assert {name: n for name, n in calls(fn, x).items() if not name.endswith("_index")} == want


def structs(dtype, *shapes):
    return tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=str)
def test_stated_outputs_are_those_of_the_reference(dtype):
    """Families state the shapes of their results, so that lowering need not trace the reference for them."""
    rest = {"aniso": ((P, 3), (P, 3, 3)), "iso": ((P, 1),)}
    families = [
        (
            aggregate.family(metric),
            (*structs(dtype, (Q, 3), (P, 3)), *structs(of_f, (P, F)), *structs(dtype, *rest[metric.name])),
            (Q, K),
        )
        for metric in (ANISOTROPIC, ISOTROPIC)
        for of_f in (dtype, jnp.bfloat16)
    ]
    families += [(DENSE, structs(dtype, (Q,), (Q,), width), None) for width in ((Q,), (1,))]
    families += [(FLAT, structs(dtype, (Q,), (Q,), width), (P + 1,)) for width in ((Q,), (1,))]
    for family, x, of_aux in families:
        aux = () if of_aux is None else structs(jnp.int32, of_aux)
        traced = jax.eval_shape(family.reference, x, aux)
        assert [(s.shape, s.dtype) for s in family.outputs(x, aux)] == [(s.shape, s.dtype) for s in traced]
