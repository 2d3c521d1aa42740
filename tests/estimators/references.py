"""Slow, literal float64 definitions, written from the formulas of ESTIMATORS.md. They share no code with gradvar."""

from __future__ import annotations

import itertools
import math

import numpy as np


def gram_of(vectors):
    """S_ij = <s_i, s_j> by a double loop."""
    n = len(vectors)
    gram = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            gram[i, j] = sum(a * b for a, b in zip(vectors[i], vectors[j], strict=True))
    return gram


def advantage(rewards, kind, lengths=None):
    n = len(rewards)
    mean = sum(rewards) / n
    out = []
    for i, r in enumerate(rewards):
        if kind == "score":
            out.append(1.0)
        elif kind == "raw":
            out.append(r)
        elif kind == "mean":
            out.append(r - mean)
        elif kind == "rloo":
            others = [rewards[j] for j in range(n) if j != i]
            out.append(r - sum(others) / (n - 1))
        elif kind == "opo":
            out.append(r - sum(a * b for a, b in zip(lengths, rewards, strict=True)) / sum(lengths))
        elif kind == "grpo":
            std = math.sqrt(sum((x - mean) ** 2 for x in rewards) / (n - 1))
            out.append((r - mean) / (std + 1e-6))
        else:
            raise KeyError(kind)
    return np.array(out)


def weights(rule, lengths, *, alpha=None, max_length=None):
    n = len(lengths)
    if rule == "grpo":
        return np.array([1 / (n * length) for length in lengths])
    if rule == "dapo":
        return np.array([1 / sum(lengths) for _ in lengths])
    if rule == "dr_grpo":
        return np.array([1 / (n * max_length) for _ in lengths])
    if rule == "vl_norm":
        powers = [length**-alpha for length in lengths]
        return np.array([p / (max_length * sum(powers)) for p in powers])
    if rule == "token_sum":
        return np.ones(n)
    if rule == "token_sum_norm":
        return np.array([1 / max_length for _ in lengths])
    if rule == "seq_mean_token_sum":
        return np.array([1 / n for _ in lengths])
    raise KeyError(rule)


def deviation(gradients):
    """||g_i - mean g||^2 from the vectors themselves."""
    mean = sum(gradients) / len(gradients)
    return np.array([sum((a - b) ** 2 for a, b in zip(g, mean, strict=True)) for g in gradients])


def within_length(gradients, lengths, k):
    """k/(k+1) ||g_i - mean of the k nearest in length||^2, for lengths without ties in distance."""
    out = []
    for i, g in enumerate(gradients):
        others = sorted((j for j in range(len(gradients)) if j != i), key=lambda j: abs(lengths[j] - lengths[i]))
        near = sum(gradients[j] for j in others[:k]) / k
        out.append(k / (k + 1) * sum((a - b) ** 2 for a, b in zip(g, near, strict=True)))
    return np.array(out)


def update(vectors, rewards, lengths, members, rule, kind, *, alpha=None, max_length=None):
    """ghat of one group, as a vector."""
    r, ell = [rewards[i] for i in members], [lengths[i] for i in members]
    x = weights(rule, ell, alpha=alpha, max_length=max_length)
    a = advantage(r, kind, ell)
    return sum(x[m] * a[m] * vectors[i] for m, i in enumerate(members))


def moments(vectors, rewards, lengths, permutations, rule, kind, *, alpha=None, max_length=None, without=None):
    """(same, cross): means of <ghat_b, ghat_b> and <ghat_a, ghat_b> over disjoint groups, groups with `without` left
    out. `permutations` is a list of lists of groups."""
    same, cross = [], []
    for groups in permutations:
        kept = [
            update(vectors, rewards, lengths, list(g), rule, kind, alpha=alpha, max_length=max_length)
            for g in groups
            if without is None or without not in list(g)
        ]
        same += [float(u @ u) for u in kept]
        cross += [float(u @ v) for u, v in itertools.permutations(kept, 2)]
    return np.mean(same), np.mean(cross) if cross else math.nan


def silent_share(rewards, n):
    """Share of all groups of n whose rewards are equal, by listing every group."""
    groups = list(itertools.combinations(range(len(rewards)), n))
    return sum(len({rewards[i] for i in g}) == 1 for g in groups) / len(groups)


def gamma_quasi_score(theta, lengths, y, n_centred, vbar):
    """sum_i (y_i - mu_i)/mu_i^2 dmu_i/d(log c, beta), mu = (1 - 2/N) c L^beta + vbar/N."""
    total = np.zeros(2)
    for length, value in zip(lengths, y, strict=True):
        v = math.exp(theta[0]) * length ** theta[1]
        mu = (1 - 2 / n_centred) * v + vbar / n_centred
        slope = (1 - 2 / n_centred) * v * np.array([1.0, math.log(length)])
        total += (value - mu) / mu**2 * slope
    return total


def length_bin_signals(gradients, bins):
    """(sum_b p_b ||m_b - m||^2, ||m||^2) without bias: products of different responses, by loops."""
    n, count = len(gradients), max(bins) + 1
    share = [sum(b == k for b in bins) / n for k in range(count)]

    def product(b, c):
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j and bins[i] == b and bins[j] == c]
        return sum(float(gradients[i] @ gradients[j]) for i, j in pairs) / len(pairs)

    whole = sum(share[b] * share[c] * product(b, c) for b in range(count) for c in range(count))
    return sum(share[b] * product(b, b) for b in range(count)) - whole, whole


def baseline_parts(vectors, rewards, lengths, permutations, rule, kind, *, without=None):
    """Variances and norms of ghat with the group's baseline and that of all, by loops; `without` leaves one out."""
    kept = [i for i in range(len(rewards)) if i != without]
    everyone = dict(zip(kept, advantage([rewards[i] for i in kept], kind, [lengths[i] for i in kept]), strict=True))
    found = []
    for common in (False, True):
        same, cross, norms = [], [], []
        for groups in permutations:
            updates = []
            for g in groups:
                members = list(g)
                if without in members:
                    continue
                x = weights(rule, [lengths[i] for i in members])
                inside = advantage([rewards[i] for i in members], kind, [lengths[i] for i in members])
                a = [everyone[i] for i in members] if common else inside
                terms = [x[m] * a[m] * vectors[i] for m, i in enumerate(members)]
                updates.append(sum(terms))
                norms.append(sum(float(t @ t) for t in terms))
            same += [float(u @ u) for u in updates]
            cross += [float(u @ v) for u, v in itertools.permutations(updates, 2)]
        found.append((np.mean(same) - np.mean(cross), np.mean(norms)))
    return np.array([found[0][0], found[1][0], found[0][1], found[1][1]])
