"""Images of Gaussians under JAX's transformations, and with cameras split over devices."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import splat_oracle
import splat_scenes
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as S

OPTIONS = {"width": 20, "height": 17, "sh_degree": 0}
SHARED = ("means", "quats", "scales", "opacities", "colors")


def scene_of(rng, cameras=4):
    """A scene of 12 Gaussians, and cameras around: (Gaussians, viewmats, Ks)."""
    scene = splat_scenes.gaussians(rng, P=12, coefficients=1)
    turns = [np.eye(4) for _ in range(cameras)]
    for turn in turns:
        turn[:3, :3] = np.linalg.qr(np.eye(3) + 0.03 * rng.normal(size=(3, 3)))[0]
        turn[:3, :3] *= np.sign(np.diag(turn[:3, :3]))
        turn[:3, 3] = 0.1 * rng.normal(size=3)
    viewmats = np.stack([turn @ scene["viewmat"] for turn in turns])
    Ks = np.stack([np.array([[f, 0, 10], [0, f, 8], [0, 0, 1.0]]) for f in rng.uniform(14, 18, cameras)])
    return {n: scene[n] for n in SHARED}, viewmats, Ks


def image_loss(gaussians, viewmat, K, implementation=None):
    r = splat_scenes.render(gaussians | {"viewmat": viewmat, "K": K}, OPTIONS, implementation)
    return jnp.square(r.image).sum() + jnp.sin(r.alpha).sum() + jnp.square(r.depth).sum()


def in_numpy(gaussians, viewmat, K):
    """Gradients of ``image_loss``, by name."""
    o = splat_oracle.Oracle(gaussians | {"viewmat": viewmat, "K": K}, **OPTIONS)
    return o.first({"image": 2 * o.image, "alpha": np.cos(o.alpha), "depth": 2 * o.depth})


def of_cameras(gaussians, viewmats, Ks):
    """Gradients of the sum over cameras: of Gaussians, viewmats, Ks."""
    each = [in_numpy(gaussians, *camera) for camera in zip(viewmats, Ks, strict=True)]
    shared = {n: sum(e[n] for e in each) for n in gaussians}
    return shared, np.stack([e["viewmat"] for e in each]), np.stack([e["K"] for e in each])


def total(gaussians, viewmats, Ks, implementation=None):
    one = functools.partial(image_loss, implementation=implementation)
    return jax.vmap(one, (None, 0, 0))(gaussians, viewmats, Ks).sum()


@pytest.mark.thorough_if()
def test_vmap_over_cameras(implementation, rng):
    """Gaussians are shared, and get the summed gradient."""
    args = scene_of(rng)
    gradient = jax.grad(functools.partial(total, implementation=implementation), (0, 1, 2))
    helpers.assert_trees_close(helpers.quick_jit(gradient)(*splat_tree(args)), of_cameras(*args), 1e-8)


def splat_tree(args):
    return jax.tree.map(jnp.asarray, args)


@pytest.mark.thorough_if()
def test_vmap_over_scenes(implementation, rng):
    """Everything mapped, along different axes, with radii."""
    scenes = [scene_of(rng, 1) for _ in range(3)]
    stacked = jax.tree.map(lambda *a: np.stack(a, -1), *[gaussians for gaussians, *_ in scenes])
    viewmats, Ks = (np.concatenate([s[i] for s in scenes]) for i in (1, 2))

    def one(gaussians, viewmat, K):
        r = splat_scenes.render(gaussians | {"viewmat": viewmat, "K": K}, OPTIONS, implementation)
        return r, jax.grad(image_loss)(gaussians, viewmat, K, implementation)

    got, gradients = helpers.quick_jit(jax.vmap(one, (-1, 0, 0), (0, -1)))(*splat_tree((stacked, viewmats, Ks)))
    for i, (gaussians, viewmat, K) in enumerate(scenes):
        o = splat_oracle.Oracle(gaussians | {"viewmat": viewmat[0], "K": K[0]}, **OPTIONS)
        helpers.assert_close(got.image[i], o.image, 1e-10)
        np.testing.assert_array_equal(got.radii[i], o.radii)
        want = in_numpy(gaussians, viewmat[0], K[0])
        helpers.assert_trees_close({n: a[..., i] for n, a in gradients.items()}, {n: want[n] for n in gaussians}, 1e-8)


@pytest.mark.thorough_if()
def test_scan_and_checkpoint(implementation, rng):
    """Cameras one after another, each image computed again on the way back; and descent that a loop carries."""
    args = scene_of(rng)

    def loss(gaussians, viewmats, Ks):
        @jax.checkpoint
        def body(so_far, camera):
            return so_far + image_loss(gaussians, *camera, implementation), None

        return jax.lax.scan(body, jnp.zeros(()), (viewmats, Ks))[0]

    got = helpers.quick_jit(jax.grad(loss, (0, 1, 2)))(*splat_tree(args))
    helpers.assert_trees_close(got, of_cameras(*args), 1e-8)


@pytest.mark.thorough_if()
def test_twice_the_same_bits(kernels, rng):
    args = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), scene_of(rng))
    gradient = helpers.user_jit(jax.grad(functools.partial(total, implementation="ffi"), (0, 1, 2)))
    some = [jax.tree.map(np.asarray, gradient(*args)) for _ in range(3)]
    for other in some[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, some[0])


@pytest.mark.parametrize("platforms", [None, ("cpu", "cuda")], ids=["this platform", "cpu and cuda"])
@pytest.mark.thorough_if(platforms=[("cpu", "cuda")])
def test_export(platforms, rng):
    gaussians, viewmats, Ks = scene_of(rng, 1)
    args = gaussians, viewmats[0], Ks[0]
    fn = jax.grad(image_loss, 1)  # of the pose
    read = helpers.through_bytes(fn, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args), platforms)
    helpers.assert_close(read.call(*args), in_numpy(*args)["viewmat"], 1e-8)


# ---- Devices


@pytest.mark.thorough_if(cpu_implementation="xla")
@pytest.mark.thorough_if(mesh=AxisType.Explicit)
def test_cameras_split_over_devices(cpu_implementation, mesh, rng):
    """Nothing moves forward; on the way back gradients of Gaussians are one all-reduce, those of cameras stay."""
    args = scene_of(rng)
    whole, split = NamedSharding(mesh, S()), NamedSharding(mesh, S("a"))
    gaussians = jax.device_put(splat_tree(args[0]), whole)
    cameras = jax.device_put(splat_tree(args[1:]), split)

    def images(gaussians, viewmats, Ks):
        def one(viewmat, K):
            return splat_scenes.render(gaussians | {"viewmat": viewmat, "K": K}, OPTIONS, cpu_implementation)

        return jax.vmap(one)(viewmats, Ks)

    forward = helpers.quick_jit(images)
    assert not helpers.collectives(forward, gaussians, *cameras)
    r = forward(gaussians, *cameras)
    assert all(a.sharding.is_equivalent_to(split, a.ndim) for a in r)
    for i, camera in enumerate(zip(*args[1:], strict=True)):
        o = splat_oracle.Oracle(args[0] | dict(zip(("viewmat", "K"), camera, strict=True)), **OPTIONS)
        helpers.assert_close(np.asarray(r.image)[i], o.image, 1e-10)

    backward = helpers.quick_jit(jax.grad(functools.partial(total, implementation=cpu_implementation), (0, 1, 2)))
    assert [kind for kind, _ in helpers.collectives(backward, gaussians, *cameras)] == ["all-reduce"]
    got = backward(gaussians, *cameras)
    helpers.assert_trees_close(got, of_cameras(*args), 1e-8)
    assert all(a.sharding.is_equivalent_to(split, a.ndim) for a in got[1:])


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.thorough_if()
def test_shard_map(check_vma, cpu_implementation, cpu_devices, rng):
    """Cameras sharded, Gaussians with all: their gradient is the sum over shards."""
    args = scene_of(rng)
    sharded = jax.shard_map(
        lambda *args: jax.lax.psum(total(*args, implementation=cpu_implementation), "shard"),
        mesh=Mesh(np.array(cpu_devices), ("shard",)),
        in_specs=(S(), S("shard"), S("shard")),
        out_specs=S(),
        check_vma=check_vma,
    )
    got = helpers.quick_jit(jax.grad(sharded, (0, 1, 2)))(*splat_tree(args))
    helpers.assert_trees_close(got, of_cameras(*args), 1e-8)
