"""Perfusion in float64 NumPy, written from METHOD and the paper's appendix B alone; shares no code with the package."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def inner(a, b, covariance):
    """<a, b> = a^T C^-1 b, for vectors or rows."""
    return np.einsum("...i,...i->...", a, np.linalg.solve(covariance, np.asarray(b).T).T)


def similarity(e, i, covariance):
    return inner(e, np.broadcast_to(i, e.shape), covariance) / inner(i, i, covariance)


def single(W, e, i, o, covariance, bias, temperature):
    """h(e) = W e_perp + sigmoid((s - beta) / tau) o*; W [out, in], e [tokens, in]."""
    s = similarity(e, i, covariance)
    e_perp = e - s[:, None] * i
    return e_perp @ W.T + sigmoid((s - bias) / temperature)[:, None] * o


def metric_basis(inputs, covariance):
    """Appendix B: whiten with the Cholesky factor of C^-1, orthonormalise by QR, map back; [num_concepts, in]."""
    factor = np.linalg.cholesky(np.linalg.inv(covariance))  # C^-1 = L L^T
    orthonormal, _ = np.linalg.qr(factor.T @ np.asarray(inputs).T)
    return np.linalg.solve(factor.T, orthonormal).T


def several(W, e, inputs, outputs, covariance, biases, temperatures):
    """h(e) for concepts of full strength, by the orthonormal basis; inputs [concepts, in], outputs [concepts, out]."""
    e_perp = e.copy()
    for u in metric_basis(inputs, covariance):
        e_perp = e_perp - inner(e, np.broadcast_to(u, e.shape), covariance)[:, None] * u
    h = e_perp @ W.T
    for i, o, bias, temperature in zip(inputs, outputs, biases, temperatures, strict=True):
        h = h + sigmoid((similarity(e, i, covariance) - bias) / temperature)[:, None] * o
    return h


def several_with_strength(W, e, inputs, outputs, covariance, biases, temperatures, strengths):
    """h(e) = W e + sum_j g_j (gate_j o_j - c_j W i_j), with c = G^-1 [<i_k, e>]_k."""
    gram = np.array([[inner(a, b, covariance) for b in inputs] for a in inputs])
    products = np.stack([inner(e, np.broadcast_to(i, e.shape), covariance) for i in inputs])
    coordinates = np.linalg.solve(gram, products)
    h = e @ W.T
    for j, (i, o) in enumerate(zip(inputs, outputs, strict=True)):
        opening = sigmoid((similarity(e, i, covariance) - biases[j]) / temperatures[j])
        h = h + strengths[j] * (opening[:, None] * o - coordinates[j][:, None] * (W @ i))
    return h


def baked(W, i, o, covariance):
    """W' = W + (o* - W i*) (C^-1 i*)^T / <i*, i*>."""
    return W + np.outer(o - W @ i, np.linalg.solve(covariance, i)) / inner(i, i, covariance)
