"""The perceptron in NumPy float64, from its definition: backpropagation by hand, and its derivative by hand.

Everything but relu, leaky_relu and the extremes also takes complex numbers, so that complex steps check the formulas.
"""

import numpy as np
import scipy.special

# ---- Activations: σ, σ', σ''


def _decay(z):
    """exp(−|z|), with the sign by the real part."""
    return np.exp(np.where(np.real(z) > 0, -z, z))


def _sigmoid(z):
    return np.where(np.real(z) > 0, 1, _decay(z)) / (1 + _decay(z))


def _silu(p):
    s = _sigmoid(p)
    return p * s, s + p * s * (1 - s), s * (1 - s) * (2 + p * (1 - 2 * s))


def _sigmoids(p):
    s = _sigmoid(p)
    return s, s * (1 - s), s * (1 - s) * (1 - 2 * s)


def _tanh(p):
    t = np.tanh(p)
    return t, 1 - t * t, -2 * t * (1 - t * t)


def _gelu(p):
    k, a = np.sqrt(2 / np.pi), 0.044715
    t, dz, d2z = np.tanh(k * (p + a * p**3)), k * (1 + 3 * a * p**2), 6 * k * a * p
    dt = 1 - t * t
    return p * (1 + t) / 2, (1 + t) / 2 + p * dt * dz / 2, dt * dz + p / 2 * dt * (d2z - 2 * t * dz * dz)


def _gelu_exact(p):
    below, density = (1 + scipy.special.erf(p / np.sqrt(2))) / 2, np.exp(-p * p / 2) / np.sqrt(2 * np.pi)
    return p * below, below + p * density, density * (2 - p * p)


def leaky_relu(slope):
    return lambda p: (np.where(p >= 0, p, slope * p), np.where(p >= 0, 1.0, slope), 0 * p)


def softplus(beta):
    def fn(p):
        s = _sigmoid(beta * p)
        return np.where(np.real(p) > 0, p, 0) + np.log(1 + _decay(beta * p)) / beta, s, beta * s * (1 - s)

    return fn


def squareplus(beta):
    def fn(p):
        h = np.sqrt(p * p + 4 / beta**2)
        return (p + h) / 2, (1 + p / h) / 2, 2 / beta**2 / h**3

    return fn


def sine(omega):
    return lambda p: (np.sin(omega * p), omega * np.cos(omega * p), -(omega**2) * np.sin(omega * p))


ACTIVATIONS = {
    "none": lambda p: (p, 1 + 0 * p, 0 * p),
    "relu": lambda p: (np.where(p > 0, p, 0), np.where(p > 0, 1.0, 0), 0 * p),
    "leaky_relu": leaky_relu(0.01),
    "softplus": softplus(1.0),
    "sine": sine(1.0),
    "silu": _silu,
    "tanh": _tanh,
    "sigmoid": _sigmoids,
    "exponential": lambda p: (np.exp(p),) * 3,
    "squareplus": squareplus(1.0),
    "gelu": _gelu,
    "gelu_exact": _gelu_exact,
}


# ---- The network


class Oracle:
    """Of x (N, I), weights (out, in), biases (out,) or None; activations are functions as in ``ACTIVATIONS``."""

    def __init__(self, x, weights, biases, activation, output_activation):
        self.weights, self.biases = weights, biases
        self.h, self.slopes, self.bends = [x], [], []
        for layer, weight in enumerate(weights):
            p = self.h[-1] @ weight.T + (0 if biases is None else biases[layer])
            h, slope, bend = (output_activation if layer == len(weights) - 1 else activation)(p)
            self.h.append(h)
            self.slopes.append(slope)
            self.bends.append(bend)

    @property
    def y(self):
        return self.h[-1]

    def _back(self, ct):
        """β_l = a_l σ'(p_l) and a_l of each layer, and a_0: with a_L = ct, a_{l−1} = β_l W_l."""
        a, betas, cotangents = ct, [], []
        for weight, slope in zip(self.weights[::-1], self.slopes[::-1], strict=True):
            cotangents.insert(0, a)
            betas.insert(0, a * slope)
            a = betas[0] @ weight
        return betas, cotangents, a

    def first(self, ct):
        """Gradients of ⟨ct, y⟩ in x, weights and biases."""
        betas, _, in_x = self._back(ct)
        return in_x, *self._sums(betas)

    def _sums(self, sources):
        in_weights = tuple(b.T @ h for b, h in zip(sources, self.h[:-1], strict=True))
        return in_weights, None if self.biases is None else tuple(b.sum(0) for b in sources)

    def _along(self, v):
        """u_l, how p_l moves along v = (of x, of weights, of biases), and t_l, how h_l does; t_0 is v of x."""
        of_x, of_weights, of_biases = v
        us, ts = [], [of_x]
        for layer, (weight, slope) in enumerate(zip(self.weights, self.slopes, strict=True)):
            u = ts[-1] @ weight.T + self.h[layer] @ of_weights[layer].T
            us.append(u + (0 if self.biases is None else of_biases[layer]))
            ts.append(slope * us[-1])
        return us, ts

    def tangent(self, v):
        """Of y along v."""
        return self._along(v)[1][-1]

    def second(self, ct, v):
        """Gradients of ⟨v, first(ct)⟩ in x, weights, biases and ct."""
        betas, cotangents, _ = self._back(ct)
        us, ts = self._along(v)
        of_weights = v[1]
        below, sources = 0, []  # the gradient in h_l; that in p_l, where p_l bends and through all layers above
        for layer in reversed(range(len(self.weights))):
            sources.insert(0, cotangents[layer] * us[layer] * self.bends[layer] + self.slopes[layer] * below)
            below = sources[0] @ self.weights[layer] + betas[layer] @ of_weights[layer]
        in_weights, in_biases = self._sums(sources)
        in_weights = tuple(a + b.T @ t for a, b, t in zip(in_weights, betas, ts[:-1], strict=True))
        return below, in_weights, in_biases, ts[-1]
