"""What blending is, in NumPy: every Gaussian at every pixel, front to back, in float64 or, for derivatives, complex.

Derivatives of the second order are those of ``vjp`` along an imaginary step, exact to rounding; ``vjp`` itself is
compared with such a step through ``value``.
"""

import numpy as np

STEP = 1e-80


def plane(rng, P, width, height, C, *, size=3.0):
    """Random means, conics, opacities, channels, background; depths."""
    means = rng.uniform([-3, -3], [width + 3, height + 3], (P, 2))
    roots = rng.normal(size=(P, 2, 2)) * size
    inverse = np.linalg.inv(roots @ np.swapaxes(roots, 1, 2) + 0.3 * np.eye(2))
    conics = np.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], -1)
    x = means, conics, rng.uniform(0.05, 1.3, P), rng.normal(size=(P, C)), rng.normal(size=C)
    return x, rng.uniform(1, 5, P)


def _walk(x, depths, reach, width, height):
    """Of each Gaussian, front to back: index, dx, dy, raw, α, T in front, where it counts; and T at the end."""
    means, conics, opacities = x[:3]
    i, j = np.meshgrid(np.arange(width), np.arange(height))
    T, open_ = np.ones((height, width), means.dtype), np.ones((height, width), bool)
    steps = []
    with np.errstate(all="ignore"):
        for g in np.argsort(depths.astype(np.float32), kind="stable"):
            dx, dy = means[g, 0] - (i + 0.5), means[g, 1] - (j + 0.5)
            a, b, c = conics[g]
            q = -(a * dx * dx + c * dy * dy) / 2 - b * dx * dy
            raw = opacities[g] * np.exp(np.where(q.real <= 0, q, 0))
            counts = (q.real <= 0) & (raw.real >= 1 / 255)
            if reach is not None:
                x0, x1, y0, y1 = reach[g]
                counts &= (x0 <= i // 16) & (i // 16 < x1) & (y0 <= j // 16) & (j // 16 < y1)
            alpha = np.where(raw.real < 0.99, raw, 0.99)
            ends = counts & open_ & ((T * (1 - alpha)).real < 1e-4)
            open_ &= ~ends
            counts &= open_
            steps.append((g, dx, dy, raw, alpha, T, counts))
            T = np.where(counts, T * (1 - alpha), T)
    return steps, T


def margin(x, depths, width, height):
    """How far, relatively, everything is from thresholds: what is computed in float32 may fall on their other side."""
    least = np.inf
    for _, _, _, raw, alpha, before, _ in _walk(x, depths, None, width, height)[0]:
        gaps = [raw * 255 - 1, raw / 0.99 - 1, np.where(raw >= 1 / 255, before * (1 - alpha) * 1e4 - 1, 1)]
        least = min(least, *(np.abs(gap).min() for gap in gaps))
    return least


def value(x, depths, width, height, reach=None):
    steps, T = _walk(x, depths, reach, width, height)
    image = T[..., None] * x[4]
    for g, _, _, _, alpha, before, counts in steps:
        image = image + np.where(counts, alpha * before, 0)[..., None] * x[3][g]
    return image, 1 - T


def vjp(x, depths, width, height, ct, reach=None):
    steps, T = _walk(x, depths, reach, width, height)
    means, conics, opacities, channels, background = (np.zeros(a.shape, np.result_type(a, ct[0])) for a in x)
    background += (T[..., None] * ct[0]).sum((0, 1))
    behind = T * (ct[0] @ x[4] - ct[1])
    for g, dx, dy, raw, alpha, before, counts in steps[::-1]:
        u, weight = ct[0] @ x[3][g], np.where(counts, alpha * before, 0)
        channels[g] = (weight[..., None] * ct[0]).sum((0, 1))
        through = np.where(counts & (raw.real < 0.99), before * u - behind / (1 - alpha), 0)
        behind = behind + weight * u
        opacities[g] = (through * raw).sum() / x[2][g] if counts.any() else 0
        a, b, c = x[1][g]
        q_bar = np.where(counts, through * raw, 0)
        dx, dy = np.where(counts, dx, 0), np.where(counts, dy, 0)
        means[g] = -(q_bar * (a * dx + b * dy)).sum(), -(q_bar * (b * dx + c * dy)).sum()
        conics[g] = -(q_bar * dx * dx).sum() / 2, -(q_bar * dx * dy).sum(), -(q_bar * dy * dy).sum() / 2
    return means, conics, opacities, channels, background


def moved(x, v):
    return tuple(a + 1j * STEP * b for a, b in zip(x, v, strict=True))


def along(y):
    return tuple(a.imag / STEP for a in y)


def jvp(x, v, *args, **options):
    return along(value(moved(x, v), *args, **options))


def vjp_jvp(x, v, depths, width, height, ct, dct, reach=None):
    """The derivative of ``vjp`` along v and dct. With dct = 0 also the gradient of ⟨ct, J v⟩ in x."""
    return along(vjp(moved(x, v), depths, width, height, moved(ct, dct), reach))
