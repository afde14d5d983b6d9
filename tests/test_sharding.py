"""shard_map on CPU devices: gradients of replicated operands are the sum over shards, at every order.

The failure guarded against: values right, gradients silently those of one shard.
"""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as S

import jax_knn_aggregate as jka

Q, P, F, K = 8, 9, 2, 3


@pytest.fixture
def mesh(cpu_devices):
    return Mesh(np.array(cpu_devices), ("shard",))


def losses(implementation):
    op = helpers.outputs("aniso", K, implementation)
    return {
        "first": lambda *x: helpers.total(op(*x)),
        # Sums, not means, so that shards add up.
        "Eikonal": lambda *x: x[0].shape[-2] * helpers.eikonal(op)(*x),
    }


def problem(rng, batch=()):
    return helpers.cloud(rng, "aniso", Q, P, F, batch=batch)


@functools.cache
def _single(name, implementation):
    return helpers.oracle_jit(jax.value_and_grad(losses(implementation)[name], range(5)))


def single(name, implementation, x):
    """The same on one device."""
    return _single(name, implementation)(*x)


@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_queries_replicated_points(check_vma, cpu_implementation, mesh, rng):
    x = problem(rng)
    specs = (S("shard"), S(), S(), S(), S())
    for name, loss in losses(cpu_implementation).items():

        def sharded(*x, loss=loss):
            return jax.shard_map(
                lambda *x: jax.lax.psum(loss(*x), "shard"),
                mesh=mesh,
                in_specs=specs,
                out_specs=S(),
                check_vma=check_vma,
            )(*x)

        got = helpers.quick_jit(jax.value_and_grad(sharded, range(5)))(*x)
        helpers.assert_trees_close(got, single(name, cpu_implementation, x), 1e-9, f"{name}: ")


def test_gradient_inside(cpu_implementation, mesh, rng):
    """Under check_vma a gradient taken inside is summed over shards for what is replicated, and local for the rest."""
    x = problem(rng)
    specs = (S("shard"), S(), S(), S(), S())
    for name, loss in losses(cpu_implementation).items():
        inside = jax.shard_map(jax.grad(loss, range(5)), mesh=mesh, in_specs=specs, out_specs=specs, check_vma=True)
        helpers.assert_trees_close(
            helpers.quick_jit(inside)(*x), single(name, cpu_implementation, x)[1], 1e-9, f"{name}: "
        )


@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_clouds_replicated_queries(check_vma, cpu_implementation, mesh, rng):
    """Each shard has a cloud of its own, and all see the same queries."""
    x = problem(rng, (4,))
    x = (x[0][0], *x[1:])
    specs = (S(), *[S("shard")] * 4)
    for name, loss in losses(cpu_implementation).items():

        def sharded(*x, loss=loss):
            def local(q, *rest):
                if (
                    check_vma
                ):  # so that the Eikonal loss's own gradient stays local; its transpose is the sum over shards
                    q = jax.lax.pcast(q, "shard", to="varying")
                return jax.lax.psum(loss(q, *(a[0] for a in rest)), "shard")

            return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=S(), check_vma=check_vma)(*x)

        got = helpers.quick_jit(jax.value_and_grad(sharded, range(5)))(*x)

        each = [single(name, cpu_implementation, (x[0], *(a[i] for a in x[1:]))) for i in range(4)]
        summed = sum(e[0] for e in each), sum(e[1][0] for e in each)
        want = (summed[0], (summed[1], *(np.stack(a) for a in zip(*(e[1][1:] for e in each), strict=True))))
        helpers.assert_trees_close(got, want, 1e-9, f"{name}: ")


@pytest.mark.parametrize("check_vma", [True, False])
def test_values_of_every_entry_point(check_vma, cpu_implementation, mesh, rng):
    x = problem(rng)
    options = {"implementation": cpu_implementation}
    idxs = rng.integers(-1, P, (Q, K))
    table = rng.integers(-1, P, (P, K))

    def every(q, idxs, table, length, *rest):
        p, f, sigma, _ = rest
        return (
            jka.knn_aggregate_aniso(q, *rest, K, p_lengths=length, **options),
            jka.knn_aggregate_aniso_precomputed(q, *rest, idxs, **options),
            jka.knn_aggregate_aniso_lookup(q, *rest, table, K, **options),
            jka.knn_aggregate(q, p, f, sigma[:, :1], K, **options),
            jka.knn_search(q, p, K, p_lengths=length, **options),
        )

    args = (x[0], idxs, table, np.int32(7), *x[1:])
    specs = (S("shard"), S("shard"), *[S()] * 6)
    fn = jax.shard_map(every, mesh=mesh, in_specs=specs, out_specs=S("shard"), check_vma=check_vma)
    got, want = helpers.quick_jit(fn)(*args), helpers.quick_jit(every)(*helpers.on_cpu(args))
    helpers.assert_trees_close(got, want, 1e-12)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g.idxs, w.idxs)
    table = jax.shard_map(
        lambda p: jka.build_knn_table(p, K, **options), mesh=mesh, in_specs=S(), out_specs=S(), check_vma=check_vma
    )
    np.testing.assert_array_equal(table(x[1]), jka.build_knn_table(x[1], K))


def test_forward_mode_and_vmap_inside(cpu_implementation, mesh, rng):
    x = problem(rng)
    v = problem(rng)
    op = helpers.outputs("aniso", K, cpu_implementation)

    def push(q, dq, rest, drest):  # the queries' tangents vary, those of the points do not
        return jax.jvp(op, (q, *rest), (dq, *drest))[1]

    def mapped(q, dq, rest, drest):
        return jax.vmap(lambda q: op(q, *rest))(jnp.stack([q, q + 0.1]))

    args = (x[0], v[0], x[1:], v[1:])
    for fn, out in ((push, S("shard")), (mapped, S(None, "shard"))):
        sharded = jax.shard_map(fn, mesh=mesh, in_specs=(S("shard"), S("shard"), S(), S()), out_specs=out)
        want = helpers.quick_jit(fn)(*helpers.on_cpu(args))
        helpers.assert_trees_close(helpers.quick_jit(sharded)(*args), want, 1e-10)


def test_explicit_mesh(cpu_implementation, cpu_devices, rng):
    """The default kind of mesh: explicit axes, arrays placed on it before."""
    mesh = jax.make_mesh((4,), ("shard",), devices=cpu_devices)
    x = problem(rng)
    specs = (S("shard"), S(), S(), S(), S())
    placed = tuple(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(x, specs, strict=True))
    name = "Eikonal"
    loss = losses(cpu_implementation)[name]

    def sharded(*x):
        return jax.shard_map(lambda *x: jax.lax.psum(loss(*x), "shard"), mesh=mesh, in_specs=specs, out_specs=S())(*x)

    got = helpers.quick_jit(jax.value_and_grad(sharded, range(5)))(*placed)
    helpers.assert_trees_close(got, single(name, cpu_implementation, x), 1e-9)
