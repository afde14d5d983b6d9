"""Images of Gaussians against plain JAX: forward, gradients, tangents, and Hessians times vectors."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_knn_aggregate as jka

from ..harness.measure import OURS, Case, Program, Session

Arrays = dict[str, jax.Array]
#: What gradients are taken in.
TRAINED = ("means", "quats", "scales", "opacities", "colors")


def scene(P: int, width: int, height: int, spread: float, seed: int) -> Arrays:
    """A room, as training leaves one: flat Gaussians on spheres, floor, back wall and a far dome, and some in the air.

    spread: their size in units of their distance from each other.
    """
    rng = np.random.default_rng(seed)

    def unit(v: np.ndarray) -> np.ndarray:
        return v / np.linalg.norm(v, axis=-1, keepdims=True)

    spheres, walls, far, air = np.split(rng.permutation(P), (np.array([0.28, 0.84, 0.94]) * P).astype(int))
    means, normals, spacing = np.zeros((P, 3)), unit(rng.normal(size=(P, 3))), np.full(P, np.sqrt(450 / P))
    of = rng.integers(24, size=len(spheres))
    centres, radii = rng.uniform([-3.5, -1.8, -2.5], [3.5, 1.2, 5], (24, 3)), rng.uniform(0.4, 0.9, 24)
    means[spheres] = centres[of] + radii[of, None] * normals[spheres]
    floor, u = rng.random(len(walls)) < 0.67, rng.uniform(-7, 7, (len(walls), 2))
    on_floor = np.stack([u[:, 0], np.full(len(u), 1.6), u[:, 1] + 4], -1)
    on_wall = np.stack([u[:, 0], u[:, 1] / 2 - 1.5, np.full(len(u), 7)], -1)
    means[walls] = np.where(floor[:, None], on_floor, on_wall)
    normals[walls] = np.where(floor[:, None], [0, -1, 0], [0, 0, -1])
    distance = rng.uniform(10, 30, len(far))
    normals[far, 2] = -np.abs(normals[far, 2])
    means[far], spacing[far] = -distance[:, None] * normals[far], distance * np.sqrt(2 * np.pi / max(len(far), 1))
    means[air] = rng.uniform([-5, -3, -2], [5, 1.6, 7], (len(air), 3))
    normals = unit(normals + 0.15 * rng.normal(size=(P, 3)))
    means += 0.3 * spacing[:, None] * rng.normal(size=(P, 3))
    # The rotation that takes z to the normal, after a turn about z.
    tilt = np.stack([1 + 1e-6 + normals[:, 2], -normals[:, 1], normals[:, 0], 0 * spacing], -1)
    turn = rng.uniform(0, np.pi, P)
    (a, b, c, d), cos, sin = tilt.T, np.cos(turn), np.sin(turn)
    quats = np.stack([a * cos - d * sin, b * cos + c * sin, c * cos - b * sin, d * cos + a * sin], -1)
    scales = (spread * spacing * np.exp(0.55 * rng.normal(size=P)))[:, None] * np.exp(0.35 * rng.normal(size=(P, 3)))
    scales[:, 2] *= 0.12
    colors = 0.08 * rng.normal(size=(P, 16, 3))
    colors[:, 0] = 0.9 * rng.normal(size=(P, 3))
    eye = np.array([0.6, -1.2, -6])
    z = unit(-eye)
    x = unit(np.cross([0, 1, 0], z))
    viewmat = np.eye(4)
    viewmat[:3, :3] = np.stack([x, np.cross(z, x), z])
    viewmat[:3, 3] = -viewmat[:3, :3] @ eye
    focal = max(width, height) / 2 / np.tan(np.deg2rad(25))
    arrays = {
        "means": means,
        "quats": unit(quats),
        "scales": scales,
        "opacities": 1 / (1 + np.exp(-2 * rng.normal(size=P))),
        "colors": colors,
        "viewmat": viewmat,
        "K": np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]),
    }
    return {name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()}


# What one writes without this package: every tile tests all Gaussians, and blends a list of static length.


def _projected(s: Arrays, width: int, height: int) -> tuple[jax.Array, ...]:
    """Means, conics, opacities, colours, z, and squares around them (x0, x1, y0, y1), front to back."""
    high = jax.lax.Precision.HIGHEST
    t = jnp.einsum("ij,pj->pi", s["viewmat"][:3, :3], s["means"], precision=high) + s["viewmat"][:3, 3]
    seen = t[:, 2] > 0.01
    x, y, z = jnp.where(seen[:, None], t, 1).T
    fx, fy, cx, cy = s["K"][0, 0], s["K"][1, 1], s["K"][0, 2], s["K"][1, 2]
    lx, ly = 0.65 * width / fx, 0.65 * height / fy
    tx, ty, o = jnp.clip(x / z, -lx, lx), jnp.clip(y / z, -ly, ly), jnp.zeros_like(z)
    J = jnp.stack([jnp.stack([fx / z, o, -fx * tx / z], -1), jnp.stack([o, fy / z, -fy * ty / z], -1)], 1)
    q, a, b, c = (s["quats"] / jnp.linalg.norm(s["quats"], axis=1, keepdims=True)).T
    R = jnp.stack(
        [
            jnp.stack([1 - 2 * (b * b + c * c), 2 * (a * b - q * c), 2 * (a * c + q * b)], -1),
            jnp.stack([2 * (a * b + q * c), 1 - 2 * (a * a + c * c), 2 * (b * c - q * a)], -1),
            jnp.stack([2 * (a * c - q * b), 2 * (b * c + q * a), 1 - 2 * (a * a + b * b)], -1),
        ],
        1,
    )
    M = jnp.einsum("pij,jk,pkl,pl->pil", J, s["viewmat"][:3, :3], R, s["scales"], precision=high)
    cov = jnp.einsum("pil,pjl->pij", M, M, precision=high) + 0.3 * jnp.eye(2)
    det = cov[:, 0, 0] * cov[:, 1, 1] - cov[:, 0, 1] ** 2
    conics = jnp.stack([cov[:, 1, 1], -cov[:, 0, 1], cov[:, 0, 0]], -1) / det[:, None]
    means = jnp.stack([fx * x / z + cx, fy * y / z + cy], -1)
    opacities = jnp.where(seen, s["opacities"], 0)
    d = s["means"] - jnp.linalg.inv(s["viewmat"])[:3, 3]
    d = d / jnp.linalg.norm(d, axis=1, keepdims=True)
    colors = jnp.maximum(0.5 + jnp.einsum("pm,pmc->pc", _harmonics(d), s["colors"], precision=high), 0)
    # α >= 1/255 within this square.
    reach = jnp.sqrt(2 * jnp.log(jnp.maximum(255 * opacities, 1)))[:, None]
    half = reach * jnp.sqrt(jnp.stack([cov[:, 0, 0], cov[:, 1, 1]], -1))
    square = jnp.stack([means - half, means + half], -1).reshape(-1, 4)
    square = jnp.where((opacities > 1 / 255)[:, None], square, jnp.inf)
    order = jnp.argsort(z)
    columns = means, conics, opacities, jnp.concatenate([colors, z[:, None]], -1), jax.lax.stop_gradient(square)
    return tuple(a[order] for a in columns)


def _harmonics(d: jax.Array) -> jax.Array:
    x, y, z = d.T
    xx, yy, zz = x * x, y * y, z * z
    bands = [
        *(0.2820948 * jnp.ones_like(x), -0.4886025 * y, 0.4886025 * z, -0.4886025 * x),
        *(1.0925484 * x * y, -1.0925484 * y * z, 0.3153916 * (2 * zz - xx - yy), -1.0925484 * x * z),
        *(0.5462742 * (xx - yy), -0.5900436 * y * (3 * xx - yy), 2.8906114 * x * y * z),
        *(-0.4570458 * y * (4 * zz - xx - yy), 0.3731763 * z * (2 * zz - 3 * xx - 3 * yy)),
        *(-0.4570458 * x * (4 * zz - xx - yy), 1.4453057 * z * (xx - yy), -0.5900436 * x * (xx - 3 * yy)),
    ]
    return jnp.stack(bands, -1)


def _longest_list(s: Arrays, width: int, height: int) -> int:
    """How many Gaussians the fullest tile has."""
    x0, x1, y0, y1 = np.asarray(jax.jit(_projected, static_argnums=(1, 2))(s, width, height)[4]).T
    counts = np.zeros((-(-height // 16) + 1, -(-width // 16) + 1), int)
    columns, rows = counts.shape[1] - 1, counts.shape[0] - 1
    there = np.isfinite(x0)
    l, r, t, b = (
        np.clip(np.floor(a[there] / 16) + more, 0, most).astype(int)
        for a, more, most in ((x0, 0, columns), (x1, 1, columns), (y0, 0, rows), (y1, 1, rows))
    )
    for i, j, sign in ((t, l, 1), (t, r, -1), (b, l, -1), (b, r, 1)):
        np.add.at(counts, (i, j), sign)
    return max(1, int(counts.cumsum(0).cumsum(1).max()))


def _plain(s: Arrays, width: int, height: int, length: int) -> tuple[jax.Array, jax.Array]:
    means, conics, opacities, channels, square = _projected(s, width, height)
    columns, rows = -(-width // 16), -(-height // 16)

    @jax.checkpoint
    def tile(number: jax.Array) -> jax.Array:
        corner = 16 * jnp.stack([number % columns, number // columns]).astype(means.dtype)
        meets = (square[:, 0] < corner[0] + 16) & (square[:, 1] > corner[0])
        meets &= (square[:, 2] < corner[1] + 16) & (square[:, 3] > corner[1])
        (some,) = jnp.nonzero(meets, size=length, fill_value=means.shape[0])
        m, c, o, color = (a.at[some].get(mode="fill", fill_value=0) for a in (means, conics, opacities, channels))
        inner = jnp.stack(jnp.meshgrid(jnp.arange(16), jnp.arange(16)), -1).reshape(-1, 2) + 0.5
        dx, dy = jnp.moveaxis(m[:, None] - (corner + inner), -1, 0)
        q = -0.5 * (c[:, :1] * dx * dx + c[:, 2:] * dy * dy) - c[:, 1:2] * dx * dy
        alpha = jnp.minimum(o[:, None] * jnp.exp(jnp.minimum(q, 0)), 0.99)
        alpha = jnp.where(alpha >= 1 / 255, alpha, 0)
        after = jnp.cumprod(1 - alpha, 0)
        before = jnp.concatenate([jnp.ones_like(after[:1]), after[:-1]])
        weights = jnp.where(after >= 1e-4, alpha * before, 0)
        seen = jnp.einsum("gp,gc->pc", weights, color, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([seen, weights.sum(0)[:, None]], -1)

    tiles = jax.lax.map(tile, jnp.arange(rows * columns))
    whole = tiles.reshape(rows, columns, 16, 16, -1).swapaxes(1, 2).reshape(rows * 16, columns * 16, -1)
    return whole[:height, :width, :-1], whole[:height, :width, -1]


def _ours(s: Arrays, width: int, height: int) -> tuple[jax.Array, jax.Array]:
    r = jka.render_gaussians(**s, width=width, height=height, sh_degree=3 if s["colors"].ndim == 3 else None)
    return jnp.concatenate([r.image, r.depth[..., None]], -1), r.alpha


def steps(render: Any, s: Arrays, width: int, height: int) -> dict[str, Program]:
    """Programs on fixed inputs; "both" is value and gradient."""
    camera = {name: s[name] for name in ("viewmat", "K")}
    x = {name: s[name] for name in TRAINED}
    keys = jax.random.split(jax.random.key(2), len(x) + 1)
    ct = jax.random.normal(keys[0], (height, width, 5))
    v = {name: 0.1 * a * jax.random.normal(key, a.shape) for (name, a), key in zip(x.items(), keys[1:], strict=True)}

    def loss(x: Arrays) -> jax.Array:
        image, alpha = render(x | camera, width, height)
        return (ct[..., :3] * image[..., :3]).sum() + (ct[..., 3] * image[..., -1]).sum() + (ct[..., 4] * alpha).sum()

    fns = {
        "forward": lambda x, v: render(x | camera, width, height),
        "both": lambda x, v: jax.value_and_grad(loss)(x),
        "jvp": lambda x, v: jax.jvp(lambda x: render(x | camera, width, height), (x,), (v,)),
        "Hessian times vector": lambda x, v: jax.jvp(jax.grad(loss), (x,), (v,))[1],
    }
    return {name: Program(fn, x, v) for name, fn in fns.items()}


Workload = tuple[str, Arrays, int, int, list[str]]


def workloads(large: bool, quick: bool = False) -> list[Workload]:
    """Name, scene, size, and which programs."""
    first, every = ["forward", "both"], ["forward", "both", "jvp", "Hessian times vector"]
    if quick:
        return [("200 Gaussians, 40 x 33", scene(200, 40, 33, 0.6, 1), 40, 33, every)]
    if not large:
        return [("20 k Gaussians, 400 x 300", scene(20_000, 400, 300, 0.6, 1), 400, 300, every)]
    S1 = scene(100_000, 800, 800, 0.6, 1)
    wide = S1 | {"colors": jax.random.uniform(jax.random.key(3), (100_000, 32))}
    narrow = wide | {"colors": wide["colors"][:, :3]}
    return [
        ("S1, 100 k Gaussians, 800 x 800", S1, 800, 800, every),
        ("S2, 1 M Gaussians, 1920 x 1080", scene(1_000_000, 1920, 1080, 0.8, 2), 1920, 1080, first),
        ("S3, 3 M Gaussians, 1920 x 1080", scene(3_000_000, 1920, 1080, 0.95, 3), 1920, 1080, first),
        ("S1 with 3 channels", narrow, 800, 800, first),
        ("S1 with 32 channels", wide, 800, 800, first),
    ]


def run(session: Session) -> dict[str, Any]:
    """Milliseconds, and ratios of plain JAX's to ours in values and first order. Further workloads: ours alone."""
    cases, lists = [], {}
    for number, (name, s, width, height, columns) in enumerate(workloads(session.large, session.quick)):
        programs = {OURS: steps(_ours, s, width, height)}
        if number == 0:
            lists[name] = _longest_list(s, width, height)
            programs["plain JAX"] = steps(functools.partial(_plain, length=lists[name]), s, width, height)
        for column in columns:
            who = [w for w in programs if w == OURS or column in ("forward", "both")]
            cases.append(Case((name, column), {w: programs[w][column] for w in who}))
    ms = session.measure(cases)
    faster = {
        name: {c: t["plain JAX"]["median_ms"] / t[OURS]["median_ms"] for c, t in columns.items() if "plain JAX" in t}
        for name, columns in ms.items()
    }
    return {
        "longest_list_of_a_tile": lists,
        "ms": ms,
        "times_faster_than_plain_JAX": {n: f for n, f in faster.items() if f},
    }
