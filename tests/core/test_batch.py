"""Leading batch axes of size n or 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_knn_aggregate.core import batch


def test_batch_shape():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 1, 5, 3), (1, 4, 7), (1, 1))]
    assert batch.batch_shape(shapes, (2, 1, 0)) == (2, 4)
    assert batch.batch_shape(shapes[:1], (4,)) == ()
    empty = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((0, 3), (1, 3))]
    assert batch.batch_shape(empty, (1, 1)) == (0,)


def test_over_batch(rng):
    a = jnp.asarray(rng.normal(size=(2, 1, 4, 5)))
    b = jnp.asarray(rng.normal(size=(1, 3, 5)))
    seen = []

    def fn(a, b):
        seen.append((a.shape, b.shape))
        return a @ b

    got = batch.over_batch(fn, (a, b), (2, 1))
    np.testing.assert_allclose(
        got, np.einsum("abij,abj->abi", np.broadcast_to(a, (2, 3, 4, 5)), np.broadcast_to(b, (2, 3, 5))), rtol=1e-12
    )
    assert seen == [((4, 5), (5,))]
    assert batch.over_batch(fn, (a[0, 0], b[0, 0]), (2, 1)).shape == (4,)
    text = str(jax.make_jaxpr(lambda a, b: batch.over_batch(lambda a, b: a @ b, (a, b), (2, 1)))(a, b))
    assert "f64[2,3,4,5]" not in text, "a shared operand was copied"


@pytest.mark.parametrize("shape", [(2, 1, 4), (1, 3, 4), (2, 3, 4), (1, 1, 4)], ids=str)
def test_fit(shape, rng):
    for have in ((2, 3, 4), (2, 1, 4), (1, 1, 4)):
        a = rng.normal(size=have)
        want = (
            a.sum(tuple(i for i in range(3) if shape[i] == 1), keepdims=True)
            if any(h != 1 and s == 1 for h, s in zip(have, shape, strict=True))
            else a
        )
        got = batch.fit(jnp.asarray(a), shape)
        assert got.shape == shape
        np.testing.assert_allclose(got, np.broadcast_to(want, shape), rtol=1e-12)


@pytest.mark.parametrize(
    "batches, merged, full",
    [
        ([(), ()], [(), ()], ()),
        ([(2, 3), (2, 3)], [(6,), (6,)], (6,)),
        ([(3, 2), (1, 2)], [(3, 2), (1, 2)], (3, 2)),  # vmap of q over 3 scenes with p (2, P, 3) shared
        ([(2, 3, 4), (2, 3, 1)], [(6, 4), (6, 1)], (6, 4)),
        ([(2, 1, 3), (1, 1, 3)], [(2, 3), (1, 3)], (2, 3)),
        ([(2, 1, 3), (2, 1, 3)], [(6,), (6,)], (6,)),  # an axis of size 1 keeps no others apart
        ([(1, 1), (1, 1)], [(), ()], ()),
        ([(2, 3, 1, 5), (2, 1, 4, 1), (1, 3, 4, 5)], [(2, 3, 1, 5), (2, 1, 4, 1), (1, 3, 4, 5)], (2, 3, 4, 5)),
        ([(0, 3), (1, 3)], [(0, 3), (1, 3)], (0, 3)),
        ([(0, 3), (0, 3)], [(0,), (0,)], (0,)),
    ],
    ids=str,
)
def test_merged(batches, merged, full):
    assert batch.merged(batches) == (merged, full)


def test_merging_keeps_elements_where_they_are(rng):
    """Reshaping operands to merged axes and broadcasting there is broadcasting before and reshaping after."""
    for _ in range(20):
        full = rng.integers(1, 4, 4)
        batches = [tuple(int(n) if rng.random() < 0.6 else 1 for n in full) for _ in range(3)]
        arrays = [rng.normal(size=b) for b in batches]
        shapes, total = batch.merged(batches)
        before = sum(arrays)
        after = sum(a.reshape(s) for a, s in zip(arrays, shapes, strict=True))
        np.testing.assert_array_equal(after.reshape(before.shape), before)
        assert total == after.shape


def test_over_merged_batch(rng):
    """The kernel sees merged axes, its results come back with the axes that they were to have."""
    a, b = jnp.asarray(rng.normal(size=(2, 3, 1, 5))), jnp.asarray(rng.normal(size=(2, 3, 4, 1)))
    outputs = [jax.ShapeDtypeStruct((2, 3, 4, 5), a.dtype), jax.ShapeDtypeStruct((2, 3, 1, 5), a.dtype)]

    def kernel(operands, results, full):
        a, b = operands
        assert (a.shape, b.shape, full) == ((6, 1, 5), (6, 4, 1), (6, 4))
        assert [s.shape for s in results] == [(6, 4, 5), (6, 1, 5)]
        return [a + b, 2 * a]

    total, twice = batch.over_merged_batch(kernel, [a, b], 3, outputs)
    np.testing.assert_array_equal(total, np.asarray(a) + np.asarray(b))
    np.testing.assert_array_equal(twice, 2 * a)
    assert batch.over_merged_batch(lambda *_: None, [a, b], 3, outputs) is None


def test_over_merged_batch_of_too_many_axes():
    n = batch.MAX_BATCH_AXES + 1
    operands = [jnp.zeros([2 if axis == i else 1 for axis in range(n)]) for i in range(n)]
    outputs = [jax.ShapeDtypeStruct((2,) * n, operands[0].dtype)]

    def kernel(operands, results, full):
        raise AssertionError(f"was called with axes {full}")

    assert batch.over_merged_batch(kernel, operands, n, outputs) is None


def test_size():
    assert batch.size(()) == 1
    assert batch.size((2, 0, 3)) == 0
    assert batch.size((70000, 70000)) == 4_900_000_000
