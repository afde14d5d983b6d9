"""Blending under JAX's transformations, and split over devices."""

import functools

import blend_oracle as oracle
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as S

from jax_knn_aggregate.ops.splat.blend import blend

WIDTH, HEIGHT, P, C = 20, 18, 12, 2
#: Means, conics and depths differ from camera to camera; opacities, channels and background are of the scene.
CAMERAS = (0, 0, None, None, None, 0)


def step(means, conics, opacities, channels, background, depths, implementation=None):
    """A loss on values and on the gradient in means and conics: every role in reverse."""

    def loss(means, conics):
        image, alpha = blend(
            *(means, conics, opacities, channels, background, depths, None),
            width=WIDTH,
            height=HEIGHT,
            implementation=implementation,
        )
        return jnp.sin(image).sum() + jnp.square(alpha).sum()

    value, slopes = jax.value_and_grad(loss, (0, 1))(means, conics)
    return value + sum(jnp.square(s).sum() for s in slopes)


def step_in_numpy(*operands):
    """The gradients of ``step`` in the first five."""
    *x, depths = operands
    where = depths, WIDTH, HEIGHT
    image, alpha = oracle.value(x, *where)
    ct = np.cos(image), 2 * alpha
    bars = oracle.vjp(x, *where, ct)
    v = 2 * bars[0], 2 * bars[1], 0 * x[2], 0 * x[3], 0 * x[4]
    d_image, d_alpha = oracle.jvp(x, v, *where)
    dct = -np.sin(image) * d_image, 2 * d_alpha
    return tuple(a + b for a, b in zip(bars, oracle.vjp_jvp(x, v, *where, ct, dct), strict=True))


def scenes(rng, n):
    """Operands, depths last, each with a leading axis."""
    some = [oracle.plane(rng, P, WIDTH, HEIGHT, C) for _ in range(n)]
    return tuple(np.stack(a) for a in zip(*((*x, depths) for x, depths in some), strict=True))


def of_cameras(operands):
    """Operands of which those that cameras share are the first camera's."""
    return tuple(a if axis == 0 else a[0] for a, axis in zip(operands, CAMERAS, strict=True))


def gradients(operands, axes):
    """Of the sum of ``step`` over what is mapped."""
    n = next(len(a) for a, axis in zip(operands, axes, strict=True) if axis == 0)
    single = [step_in_numpy(*(a if m is None else a[i] for a, m in zip(operands, axes, strict=True))) for i in range(n)]
    return tuple(np.stack(g) if m == 0 else sum(g) for g, m in zip(zip(*single, strict=True), axes, strict=False))


@pytest.mark.parametrize(
    "axes", [CAMERAS, (0,) * 6, (None, None, None, 0, None, None)], ids=["cameras", "scenes", "colours"]
)
@pytest.mark.thorough_if(implementation="xla")
def test_vmap(axes, implementation, rng):
    """What is shared gets the sum of gradients, and is not copied on the way."""
    operands = tuple(a if axis == 0 else a[0] for a, axis in zip(scenes(rng, 3), axes, strict=True))

    def total(*operands):
        return jax.vmap(functools.partial(step, implementation=implementation), axes)(*operands).sum()

    got = helpers.quick_jit(jax.grad(total, range(5)))(*operands)
    helpers.assert_trees_close(got, gradients(operands, axes), 1e-9)


def test_mapped_cotangents(kernels, rng):
    """A Jacobian: what forward leaves is shared, cotangents are mapped."""
    x, depths = oracle.plane(rng, 5, 4, 3, 1)

    def image(means):
        return blend(
            means, *map(jnp.asarray, x[1:]), jnp.asarray(depths), None, width=4, height=3, implementation="ffi"
        )[0]

    got = helpers.quick_jit(lambda m: (jax.jacrev(image)(m), jax.jacfwd(image)(m)))(jnp.asarray(x[0]))
    want = np.empty((3, 4, 1, 5, 2))
    for k in np.ndindex(5, 2):
        v = tuple(np.zeros_like(a) for a in x)
        v[0][k] = 1
        want[(..., *k)] = oracle.jvp(x, v, depths, 4, 3)[0]
    helpers.assert_trees_close(got, (want, want), 1e-10)


@pytest.mark.thorough_if(implementation="xla")
def test_scan_and_checkpoint(implementation, rng):
    operands = of_cameras(scenes(rng, 3))

    def total(*x):
        @jax.checkpoint
        def body(sum_, camera):
            means, conics, depths = camera
            return sum_ + step(means, conics, *x[2:5], depths, implementation), None

        return jax.lax.scan(body, jnp.zeros(()), (x[0], x[1], jnp.asarray(operands[5])))[0]

    got = helpers.quick_jit(jax.grad(total, range(5)))(*helpers.tree(operands[:5]))
    helpers.assert_trees_close(got, gradients(operands, CAMERAS), 1e-9)


@pytest.mark.thorough
def test_third_order(rng):
    """By the reference: against a difference of the second."""
    x, depths = oracle.plane(rng, 6, 8, 8, 1)
    v, w = (tuple(rng.normal(size=a.shape) * 0.1 for a in x) for _ in range(2))
    ct = rng.normal(size=(8, 8, 1)), np.zeros((8, 8))
    zero = tuple(0 * c for c in ct)

    def slope(x):
        fn = lambda x: (blend(*x, jnp.asarray(depths), None, width=8, height=8)[0] * ct[0]).sum()  # noqa: E731
        return jax.jvp(jax.grad(fn), (x,), (helpers.tree(v),))[1]

    got = helpers.product(
        jax.jit(lambda x: jax.jvp(slope, (x,), (helpers.tree(w),))[1])(helpers.tree(x)), helpers.tree(v)
    )
    ends = [
        sum((a * b).sum() for a, b in zip(oracle.vjp_jvp(at, v, depths, 8, 8, ct, zero), v, strict=True))
        for at in (tuple(a + h * b for a, b in zip(x, w, strict=True)) for h in (1e-5, -1e-5))
    ]
    want = (ends[0] - ends[1]) / 2e-5
    assert abs(got - want) <= 1e-5 * abs(want)


@pytest.mark.parametrize("platforms", [None, ("cpu", "cuda")], ids=["this platform", "cpu and cuda"])
@pytest.mark.thorough_if(platforms=[("cpu", "cuda")])
def test_export_for_any_number_of_gaussians(platforms, rng):
    (symbol,) = jax.export.symbolic_shape("P")
    sizes = (symbol, 2), (symbol, 3), (symbol,), (symbol, C), (C,), (symbol,)
    read = helpers.through_bytes(
        jax.grad(step, range(5)), [jax.ShapeDtypeStruct(size, np.float64) for size in sizes], platforms
    )
    for n in (1, 40):
        x, depths = oracle.plane(rng, n, WIDTH, HEIGHT, C)
        helpers.assert_trees_close(read.call(*x, depths), step_in_numpy(*x, depths), 1e-9)


@pytest.mark.thorough_if(cpu_implementation="xla")
@pytest.mark.thorough_if(mesh=AxisType.Explicit)
def test_cameras_split_over_devices(cpu_implementation, mesh, rng):
    """Nothing moves forward; the gradients of what cameras share are one all-reduce."""
    operands = of_cameras(scenes(rng, 8))
    placed = helpers.place(mesh, operands, [S() if axis is None else S(("a", "b")) for axis in CAMERAS])

    def images(*operands):
        fn = functools.partial(blend, reach=None, width=WIDTH, height=HEIGHT, implementation=cpu_implementation)
        return jax.vmap(fn, CAMERAS)(*operands)

    forward = helpers.quick_jit(images)
    assert not helpers.collectives(forward, *placed)
    first = [a if m is None else a[0] for a, m in zip(operands, CAMERAS, strict=True)]
    helpers.assert_close(np.asarray(forward(*placed)[0])[0], oracle.value(first[:5], first[5], WIDTH, HEIGHT)[0], 1e-10)

    def total(*operands):
        return jax.vmap(functools.partial(step, implementation=cpu_implementation), CAMERAS)(*operands).sum()

    backward = helpers.quick_jit(jax.grad(total, range(5)))
    assert {kind for kind, _ in helpers.collectives(backward, *placed)} == {"all-reduce"}
    helpers.assert_trees_close(backward(*placed), gradients(operands, CAMERAS), 1e-9)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.thorough_if(cpu_implementation="xla")
def test_shard_map(check_vma, cpu_implementation, cpu_devices, rng):
    """Cameras sharded, the scene with all: its gradient is the sum over shards."""
    operands = of_cameras(scenes(rng, 4))

    def total(*operands):
        some = jax.vmap(functools.partial(step, implementation=cpu_implementation), CAMERAS)(*operands)
        return jax.lax.psum(some.sum(), "shard")

    sharded = jax.shard_map(
        total,
        mesh=Mesh(np.array(cpu_devices), ("shard",)),
        in_specs=tuple(S() if axis is None else S("shard") for axis in CAMERAS),
        out_specs=S(),
        check_vma=check_vma,
    )
    got = helpers.quick_jit(jax.grad(sharded, range(5)))(*operands)
    helpers.assert_trees_close(got, gradients(operands, CAMERAS), 1e-9)
