"""The hash grid in NumPy float64, from its definition: every derivative of a corner's weight in closed form.

The cell of a point is exact, as floor(fma(scale, x, ½)) in the dtype of x gives it: products and sums are fractions of
integers, rounded once. What the tests compare is then the arithmetic within a cell.

Everything here is linear in the table and in the cotangent, so that three sums, of the directions along which weights
were differentiated, give every derivative of ⟨ct, y⟩: ``y`` contracts them with a table, ``x_bar`` with table and
cotangent, and ``table_bar`` with a cotangent.
"""

import functools
import itertools
import math
from fractions import Fraction

import numpy as np

PRIMES = (1, 2654435761, 805459861, 3674653429)


@functools.cache
def scales(grid):
    """float32, one operation after another; log2 and exp2 in float64, to be rounded correctly."""
    step = np.float32(math.log2(np.float32(grid.per_level_scale)))
    found = []
    for level in range(grid.levels):
        power = np.float32(2.0 ** float(np.float32(level) * step))
        found.append(power * np.float32(grid.base_resolution) - np.float32(1))
    return np.array(found, np.float32)


@functools.cache
def resolutions(grid):
    return [math.ceil(s) + 1 for s in scales(grid)]


@functools.cache
def level_sizes(grid):
    """Rows of each level."""
    sizes = []
    for r in resolutions(grid):
        n = (r**grid.dim + 7) // 8 * 8
        if grid.kind == "hash":
            n = min(n, 2**grid.log2_hashmap_size)
        elif grid.kind == "tiled":
            n = min(n, grid.base_resolution**grid.dim)
        sizes.append(n)
    return sizes


def row(grid, level, corner):
    """Of a corner, given by integers of any size, within its level."""
    resolution, rows = resolutions(grid)[level], level_sizes(grid)[level]
    corner = [c % 2**32 for c in corner]
    if grid.kind == "hash" and rows < resolution**grid.dim:
        return (
            functools.reduce(lambda a, b: a ^ b, [c * p % 2**32 for c, p in zip(corner, PRIMES, strict=False)]) % rows
        )
    return sum(c * resolution**d for d, c in enumerate(corner)) % 2**32 % rows


def rounded(value, dtype):
    """A fraction to the nearest number of a dtype, ties to even. Python rounds to float64 like that."""
    try:
        near = float(value)
    except OverflowError:
        near = math.inf if value > 0 else -math.inf
    if dtype == np.float64:
        return dtype(near)
    with np.errstate(over="ignore"):
        guess = dtype(near)
        if not np.isfinite(guess) or abs(near - float(guess)) * 2 != float(np.spacing(abs(guess))):
            return guess
    # Halfway between two, or rounded to there.
    both = guess, np.nextafter(guess, dtype(math.copysign(math.inf, near - float(guess))))
    return min(both, key=lambda n: (abs(Fraction(float(n)) - value), int(n.view(np.uint32)) & 1))


@functools.lru_cache(2**16)
def _position(x, scale, dtype):
    exact = Fraction(x) * Fraction(scale) + Fraction(1, 2)
    return rounded(exact, dtype), exact


def position(x, scale):
    """fma(scale, x, ½) in the dtype of x, and without rounding."""
    return _position(float(x), float(scale), type(x))


def place(x, scale):
    """The cell and the place within it, of one coordinate."""
    at, exact = position(x, scale)
    cell = math.floor(Fraction(float(at)))
    whole = abs(at) >= (2**23 if x.dtype == np.float32 else 2**52)
    return min(max(cell, -(2**31)), 2**31 - 1), 0.0 if whole else float(exact - cell)


def reaches(grid, x):
    """Whether a coordinate has a finite position on every level."""
    return bool(np.isfinite(x)) and all(np.isfinite(position(x, s)[0]) for s in scales(grid))


def by_a_border(grid, x, ulps=4):
    """(N,): whether a coordinate is within some ulp of a border between cells, on any level."""

    def close(coordinate, scale):
        at = float(position(coordinate, scale)[0])
        return abs(at - round(at)) <= ulps * float(np.spacing(type(coordinate)(abs(at))))

    return np.array([any(close(c, s) for c in point for s in scales(grid)) for point in x], bool)


def sides(interpolation, f):
    """s(f) and its first three derivatives."""
    if interpolation == "smoothstep":
        return 3 * f**2 - 2 * f**3, 6 * f * (1 - f), 6 - 12 * f, np.full_like(f, -12.0)
    return f, np.ones_like(f), np.zeros_like(f), np.zeros_like(f)


class Oracle:
    """Of N points, x of the dtype whose cells count; levels count as max_level says."""

    def __init__(self, grid, x, max_level=None):
        x = np.asarray(x)
        self.grid, (N, D) = grid, x.shape
        self.lost = np.array([not all(reaches(grid, c) for c in point) for point in x], bool)
        places = np.array(
            [
                [[place(c, s) for c in point] for s in scales(grid)]
                for point in np.where(self.lost[:, None], x.dtype.type(0), x)
            ]
        ).reshape(N, grid.levels, D, 2)
        self.cell, self.fraction = places[..., 0].astype(np.int64), places[..., 1]
        self.corners = [c[::-1] for c in itertools.product((0, 1), repeat=D)]
        if grid.interpolation == "nearest":
            self.corners = [(0,) * D]
        starts = np.cumsum([0, *level_sizes(grid)])
        self.rows = np.array(
            [
                [
                    [starts[l] + row(grid, l, [int(n) + b for n, b in zip(cell, c, strict=True)]) for c in self.corners]
                    for l, cell in enumerate(point)
                ]
                for point in self.cell
            ],
            np.int64,
        ).reshape(N, grid.levels, len(self.corners))
        self.count = np.ones(grid.levels)
        if max_level is not None:
            self.count = np.clip(float(max_level) - np.arange(grid.levels), 0, 1)

    @functools.cache  # noqa: B019
    def _partial(self, orders):
        """(N, levels, corners): the partial derivative of corners' weights, of these orders along the axes."""
        if self.grid.interpolation == "nearest":
            return np.full(self.rows.shape, float(sum(orders) == 0))
        weights = np.ones(self.rows.shape)
        for d, order in enumerate(orders):
            upper = (
                sides(self.grid.interpolation, self.fraction[..., d])[order] * scales(self.grid).astype(float) ** order
            )
            lower = -upper if order else 1 - upper
            weights *= np.stack([upper if c[d] else lower for c in self.corners], -1)
        return weights

    def weights(self, directions=(), axes=()):
        """Differentiated along directions (N, dim), each point its own, and along axes."""
        D, total = self.grid.dim, np.zeros(self.rows.shape)
        for along in itertools.product(range(D), repeat=len(directions)):
            factor = np.ones(len(self.rows))
            for v, d in zip(directions, along, strict=True):
                factor = factor * np.asarray(v, float)[:, d]
            orders = tuple([*along, *axes].count(d) for d in range(D))
            total += factor[:, None, None] * self._partial(orders)
        return total

    def _split(self, ct):
        N, L = self.rows.shape[:2]
        return np.asarray(ct, float).reshape(N, L, self.grid.features)

    def y(self, directions, table):
        """(N, levels·features): ⟨weights, rows of the table⟩."""
        with np.errstate(invalid="ignore"):
            found = np.einsum(
                "nlc,nlcf,l->nlf", self.weights(directions), np.asarray(table, float)[self.rows], self.count
            )
        found[self.lost] = np.nan
        return found.reshape(len(found), self.grid.levels * self.grid.features)

    def x_bar(self, directions, table, ct):
        """(N, dim): derivatives along each axis of ⟨ct, y⟩."""
        T, ct = np.asarray(table, float)[self.rows], self._split(ct)
        axes = [self.weights(directions, (d,)) for d in range(self.grid.dim)]
        bar = np.stack([np.einsum("nlc,nlcf,nlf,l->n", w, T, ct, self.count) for w in axes], -1)
        bar[self.lost] = np.nan
        return bar

    def table_bar(self, directions, ct):
        """(rows, features): the gradient of ⟨ct, y⟩ in the table."""
        parts = np.einsum("nlc,nlf,l->nlcf", self.weights(directions), self._split(ct), self.count)
        bar = np.zeros((sum(level_sizes(self.grid)), self.grid.features))
        np.add.at(bar, self.rows[~self.lost], parts[~self.lost])
        return bar

    # Derivatives of y(x, table) and of ⟨ct, y⟩. v is a tangent of x, u of the table, w of ct.

    def value(self, table):
        return self.y((), table)

    def first(self, table, ct):
        return self.x_bar((), table, ct), self.table_bar((), ct)

    def jvp(self, table, v, u):
        return self.y((v,), table) + self.y((), u)

    def second(self, table, ct, v, u):
        """Gradients of ⟨ct, jvp⟩ in x, table and ct."""
        x_bar = self.x_bar((v,), table, ct) + self.x_bar((), u, ct)
        return x_bar, self.table_bar((v,), ct), self.jvp(table, v, u)

    def jvp_of_first(self, table, ct, v, u, w):
        x_bar, table_bar, _ = self.second(table, ct, v, u)
        return x_bar + self.x_bar((), table, w), table_bar + self.table_bar((), w)

    def third(self, table, ct, v, u, p, q):
        """Gradients of the derivative of ⟨ct, y⟩ along (v, u), and then along (p, q), in x, table and ct."""
        x_bar = self.x_bar((v, p), table, ct) + self.x_bar((v,), q, ct) + self.x_bar((p,), u, ct)
        return x_bar, self.table_bar((v, p), ct), self.y((v, p), table) + self.y((v,), q) + self.y((p,), u)
