"""Arguments that are kept where a function fails."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_knn_aggregate.core.snapshots import Saved, saving


def roots(x, y):
    """sqrt(x) y: not finite where x < 0, and its gradient not where x = 0."""
    return jnp.sqrt(x) * y, jnp.arange(3)


def broken(x, y):
    def fail(a):
        raise RuntimeError("as kernels do")

    return jax.pure_callback(fail, jax.ShapeDtypeStruct(x.shape, x.dtype), x) * y, jnp.arange(3)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Saved(roots, ("x", "y"), "fw.npz", "bw.npz", (("size", 3),))


def first(saved):
    return lambda *x: saving(saved, *x)[0].sum()


@pytest.mark.parametrize("jit", [True, False])
def test_leaves_nothing(jit, saved, tmp_path):
    x, y = jnp.array([1.0, 4.0]), jnp.array([2.0, 3.0])
    wrap = jax.jit if jit else lambda f: f
    np.testing.assert_allclose(wrap(functools.partial(saving, saved))(x, y)[0], [2, 6])
    value, bars = wrap(jax.value_and_grad(first(saved), (0, 1)))(x, y)
    np.testing.assert_allclose(value, 8)
    np.testing.assert_allclose(bars, [[1, 0.75], [1, 2]])
    np.testing.assert_allclose(wrap(jax.grad(first(saved), 1))(x, y), [1, 2])
    assert not list(tmp_path.iterdir())


def test_keeps_what_was_finite(saved, tmp_path):
    x, y = jnp.array([1.0, -4.0]), jnp.array([2.0, 3.0])
    with pytest.raises(Exception, match=f"finite arguments: those are in {tmp_path / 'fw.npz'}"):
        jax.block_until_ready(jax.jit(functools.partial(saving, saved))(x, y))
    with np.load("fw.npz") as kept:
        assert set(kept) == {"x", "y", "size"}
        np.testing.assert_array_equal(kept["x"], x)


def test_keeps_cotangents_too(saved, tmp_path):
    with pytest.raises(Exception, match=f"those are in {tmp_path / 'bw.npz'}"):
        jax.block_until_ready(jax.grad(first(saved))(jnp.zeros(2), jnp.ones(2)))
    with np.load("bw.npz") as kept:
        np.testing.assert_array_equal(kept["cotangent"], np.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["bw.npz"]


def test_what_was_not_finite_is_nobody_else_s_fault(saved, tmp_path):
    assert np.isnan(saving(saved, jnp.array([jnp.nan]), jnp.ones(1))[0]).all()
    assert not list(tmp_path.iterdir())


def test_keeps_what_kernels_fail_on(saved, tmp_path):
    with pytest.raises(Exception, match="as kernels do"):
        jax.block_until_ready(saving(saved._replace(fn=broken), jnp.ones(2), jnp.ones(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["fw.npz"]


def test_says_where_it_does_not_work(saved, tmp_path, mesh):
    x = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="not saved under vmap"):
        jax.vmap(functools.partial(saving, saved))(x, x)
    with pytest.raises(ValueError, match="not saved under forward mode"):
        jax.jvp(first(saved), (x, x), (x, x))
    with pytest.raises(ValueError, match="not saved under second order"):
        jax.grad(lambda x: jax.grad(first(saved))(x, x).sum())(x)
    with pytest.raises(ValueError, match="not saved under shard_map"):
        split = P(mesh.axis_names[0])
        x = jax.device_put(jnp.ones(8), NamedSharding(mesh, split))
        jax.shard_map(lambda x: saving(saved, x, x)[0], mesh=mesh, in_specs=split, out_specs=split)(x)
    assert not list(tmp_path.iterdir())
