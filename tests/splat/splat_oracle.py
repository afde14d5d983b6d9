"""Images of Gaussians in NumPy float64, from their definition, Gaussian after Gaussian over all pixels.

Gradients by reverse mode on a tape of a dozen operations, all of which also take complex numbers: a complex step of
values checks gradients, and one of gradients makes Hessian-vector products.
"""

import numpy as np

FLOATS = ("means", "quats", "scales", "covariances", "opacities", "colors", "viewmat", "K", "background")
FLOATS += ("means2d_offset",)
STEP = 1e-30

# ---- A tape


class Var:
    """An array, and by which functions its cotangent goes on to what it was made of."""

    def __init__(self, value, *parents):
        self.value, self.parents = np.asarray(value), parents

    def __add__(self, other):
        other = var(other)
        return Var(self.value + other.value, (self, lambda c: c), (other, lambda c: c))

    def __mul__(self, other):
        other = var(other)
        return Var(self.value * other.value, (self, lambda c: c * other.value), (other, lambda c: c * self.value))

    def __truediv__(self, other):
        other = var(other)
        y = self.value / other.value
        return Var(y, (self, lambda c: c / other.value), (other, lambda c: -c * y / other.value))

    def __neg__(self):
        return Var(-self.value, (self, lambda c: -c))

    def __sub__(self, other):
        return self + -var(other)

    def __rsub__(self, other):
        return -self + other

    def __rtruediv__(self, other):
        return var(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, at):
        def back(c):
            whole = np.zeros(self.value.shape, c.dtype)
            np.add.at(whole, at, c)
            return whole

        return Var(self.value[at], (self, back))


def var(a):
    return a if isinstance(a, Var) else Var(a)


def real(a):
    return np.real(a.value)


def sqrt(a):
    y = np.sqrt(a.value)
    return Var(y, (a, lambda c: c / (2 * y)))


def exp(a):
    y = np.exp(a.value)
    return Var(y, (a, lambda c: c * y))


def where(condition, a, b):
    a, b = var(a), var(b)
    y = np.where(condition, a.value, b.value)
    return Var(y, (a, lambda c: np.where(condition, c, 0)), (b, lambda c: np.where(condition, 0, c)))


def inverse(a):
    y = np.linalg.inv(a.value)
    return Var(y, (a, lambda c: -y.T @ c @ y.T))


def total(a, weights):
    return Var((a.value * weights).sum(), (a, lambda c: c * weights))


def gradients(y, inputs):
    """Of a scalar."""
    order, seen = [], set()

    def visit(root):
        stack = [(root, iter(root.parents))]
        while stack:
            node, rest = stack[-1]
            for parent, _ in rest:
                if id(parent) not in seen:
                    seen.add(id(parent))
                    stack.append((parent, iter(parent.parents)))
                    break
            else:
                order.append(node)
                stack.pop()

    visit(y)
    cotangents = {id(y): np.ones((), y.value.dtype)}
    for node in reversed(order):
        c = cotangents.get(id(node))
        if c is None:
            continue
        for parent, back in node.parents:
            part = back(c)
            part = part.sum(tuple(range(part.ndim - parent.value.ndim)))
            kept = tuple(i for i, n in enumerate(parent.value.shape) if n == 1 and part.shape[i] != 1)
            part = part.sum(kept, keepdims=True)
            cotangents[id(parent)] = cotangents.get(id(parent), 0) + part
    return [cotangents.get(id(a), np.zeros(a.value.shape)) for a in inputs]


# ---- Matrices of arrays


def product(A, B):
    return [[sum(A[i][k] * B[k][j] for k in range(len(B))) for j in range(len(B[0]))] for i in range(len(A))]


def transposed(A):
    return [list(row) for row in zip(*A, strict=True)]


def rotation(q):
    w, x, y, z = (q[:, i] for i in range(4))
    n = sqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w / n, x / n, y / n, z / n
    return [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]


def harmonics(x, y, z):
    """By the closed forms of the normalisation."""
    pi = np.pi
    a, b = np.sqrt(3 / (4 * pi)), np.sqrt(15 / (4 * pi))
    c3, c2, c1, c0 = np.sqrt(35 / (32 * pi)), np.sqrt(105 / (4 * pi)), np.sqrt(21 / (32 * pi)), np.sqrt(7 / (16 * pi))
    return [
        var(np.full(x.value.shape, 1 / (2 * np.sqrt(pi)))),
        -a * y,
        a * z,
        -a * x,
        b * (x * y),
        -b * (y * z),
        b / (2 * np.sqrt(3)) * (2 * (z * z) - x * x - y * y),
        -b * (x * z),
        b / 2 * (x * x - y * y),
        -c3 * (y * (3 * (x * x) - y * y)),
        c2 * (x * y * z),
        -c1 * (y * (4 * (z * z) - x * x - y * y)),
        c0 * (z * (2 * (z * z) - 3 * (x * x) - 3 * (y * y))),
        -c1 * (x * (4 * (z * z) - x * x - y * y)),
        c2 / 2 * (z * (x * x - y * y)),
        -c3 * (x * (x * x - 3 * (y * y))),
    ]


# ---- The image


class Oracle:
    """Of a dict of arrays by the names of arguments, all of whose Gaussians are finite and have a shape.

    image, alpha, depth are values; ``margin`` is how near, relatively, anything comes to a threshold; ``limited`` and
    ``saturated`` count what the field-of-view limit and α = 0.99 act on.
    """

    def __init__(self, scene, *, width, height, sh_degree=None, near=0.01, far=np.inf, eps2d=0.3, antialiased=False,
                 extent="exact"):  # fmt: skip
        self.inputs = {n: var(scene[n]) for n in FLOATS if scene.get(n) is not None}
        self.width, self.height, self.margins = width, height, [1.0]
        s = self.inputs
        means, V, K = s["means"], s["viewmat"], s["K"]
        P = len(means.value)
        fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
        W = [[V[i, j] for j in range(3)] for i in range(3)]
        t = [sum(V[i, j] * means[:, j] for j in range(3)) + V[i, 3] for i in range(3)]
        x, y, z = t

        # The covariance on the screen.
        if "covariances" in s:
            S = s["covariances"]
            S = [[(S[:, i, j] + S[:, j, i]) / 2 for j in range(3)] for i in range(3)]
        else:
            R = rotation(s["quats"])
            M = [[R[i][j] * s["scales"][:, j] for j in range(3)] for i in range(3)]
            S = product(M, transposed(M))
        lx, ly = 1.3 * width / (2 * fx), 1.3 * height / (2 * fy)
        hx, hy = self.limited(x / z, lx) * z, self.limited(y / z, ly) * z
        zero = var(np.zeros(P))
        J = [[fx / z, zero, -fx * hx / (z * z)], [zero, fy / z, -fy * hy / (z * z)]]
        T = product(J, W)
        C = product(product(T, S), transposed(T))
        before = C[0][0] * C[1][1] - C[0][1] * C[1][0]
        a, b, c = C[0][0] + eps2d, C[0][1], C[1][1] + eps2d
        det = a * c - b * b
        opacities = s["opacities"]
        if antialiased:
            ratio = before / det
            opacities = opacities * sqrt(where(real(ratio) > 2.5e-5, ratio, 2.5e-5))
        u, v = fx * x / z + cx, fy * y / z + cy
        if "means2d_offset" in s:
            u, v = u + s["means2d_offset"][:, 0], v + s["means2d_offset"][:, 1]

        # Colours.
        colors = s["colors"]
        if sh_degree is not None:
            centre = inverse(V)
            d = [means[:, i] - centre[i, 3] for i in range(3)]
            length = sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2])
            basis = harmonics(*(a / length for a in d))[: (sh_degree + 1) ** 2]
            colors = sum(colors[:, m] * basis[m][:, None] for m in range(len(basis))) + 0.5
            self.near_threshold(real(colors), 0.0)
            colors = where(real(colors) > 0, colors, 0.0)

        # Radii and tiles.
        det_, mid = real(det), (real(a) + real(c)) / 2
        largest = mid + np.sqrt(np.maximum(0.1, mid**2 - det_))
        radius = np.ceil(3 * np.sqrt(largest))
        columns, rows = -(-width // 16), -(-height // 16)
        tiles = [
            np.clip(np.trunc(value / 16), 0, most).astype(int)
            for value, most in (
                (real(u) - 0.5 - radius, columns),
                (real(u) - 0.5 + radius + 15, columns),
                (real(v) - 0.5 - radius, rows),
                (real(v) - 0.5 + radius + 15, rows),
            )
        ]
        drawn = (real(z) > near) & (real(z) < far) & (det_ != 0)
        empty = (tiles[0] >= tiles[1]) | (tiles[2] >= tiles[3])
        self.radii = np.where(drawn & ~empty, radius, 0).astype(int)

        # All there is to blend, by column.
        self.drawn, self.tiles = drawn, np.stack(tiles, -1)
        self.projected = {
            "means2d": [u, v],
            "conics": [c / det, -b / det, a / det],
            "opacities": [opacities],
            "channels": [*([colors[:, i] for i in range(3)] if sh_degree is not None else []), z],
        }

        # Front to back.
        X, Y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        transmittance, live = var(np.ones((height, width))), np.ones((height, width), bool)
        image, depth = var(np.zeros((height, width, colors.value.shape[1]))), var(np.zeros((height, width)))
        self.limited_count = int(((abs(real(x / z)) > real(lx)) | (abs(real(y / z)) > real(ly)))[drawn].sum())
        self.saturated = 0
        for i in np.argsort(real(z).astype(np.float32), kind="stable"):
            if not drawn[i]:
                continue
            dx, dy = u[i] - X, v[i] - Y
            q = -0.5 * (c[i] / det[i] * dx * dx + a[i] / det[i] * dy * dy) + b[i] / det[i] * dx * dy
            below = real(q) <= 0
            alpha = opacities[i] * exp(where(below, q, 0.0))
            counts = below & (real(alpha) >= 1 / 255) & live
            if extent == "3sigma":
                x0, x1, y0, y1 = (16 * bound[i] for bound in tiles)
                counts &= (x0 < X) & (x1 > X) & (y0 < Y) & (y1 > Y)  # centres are on no border
            self.near_threshold(real(alpha)[live], 1 / 255)
            self.near_threshold(real(alpha)[live], 0.99)
            self.saturated += int((counts & (real(alpha) > 0.99)).sum())
            alpha = where(real(alpha) > 0.99, 0.99, alpha)
            after = transmittance * (1 - alpha)
            self.near_threshold(real(after)[counts], 1e-4)
            live = live & ~(counts & (real(after) < 1e-4))
            counts &= live
            weight = where(counts, transmittance * alpha, 0.0)
            image = image + weight[..., None] * colors[i]
            depth = depth + weight * z[i]
            transmittance = where(counts, after, transmittance)
        if "background" in s:
            image = image + transmittance[..., None] * s["background"]
        self.outputs = {"image": image, "alpha": 1 - transmittance, "depth": depth}
        self.image, self.alpha, self.depth = (self.outputs[n].value for n in ("image", "alpha", "depth"))

    def limited(self, ratio, limit):
        self.near_threshold(abs(real(ratio)), real(limit))
        return where(real(ratio) > real(limit), limit, where(real(ratio) < -real(limit), -limit, ratio))

    def near_threshold(self, values, threshold):
        if np.size(values):
            self.margins.append(np.min(abs(values - threshold)) / (threshold or 1.0))

    @property
    def margin(self):
        return min(self.margins)

    def first(self, ct):
        """Gradients, by name, of Σ ct·output."""
        return self.gradients(sum(total(self.outputs[n], c) for n, c in ct.items()))

    def gradients(self, loss):
        return dict(zip(self.inputs, gradients(loss, list(self.inputs.values())), strict=True))

    def first_of_projected(self, ct):
        """Of Σ ct·projected, over those that are drawn; ct has the columns as its last axis."""
        parts = [(column, ct[n][:, i]) for n, columns in self.projected.items() for i, column in enumerate(columns)]
        return self.gradients(sum(total(column, np.where(self.drawn, c, 0)) for column, c in parts))

    def values_of_projected(self):
        columns = {n: np.stack([column.value for column in many], -1) for n, many in self.projected.items()}
        return {n: np.where(self.drawn[:, None], a, 0) for n, a in columns.items()}


def stepped(scene, v, options):
    """The oracle at scene + STEP·i·v."""
    moved = {n: None if a is None else a + STEP * 1j * v[n] if n in v else a for n, a in scene.items()}
    return Oracle(moved, **options)


def tangents(scene, v, options):
    o = stepped(scene, v, options)
    return {n: getattr(o, n).imag / STEP for n in ("image", "alpha", "depth")}


def second(scene, v, ct, options):
    """The Hessian of Σ ct·output times v, by name."""
    return {n: g.imag / STEP for n, g in stepped(scene, v, options).first(ct).items()}
