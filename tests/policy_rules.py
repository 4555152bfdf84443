"""Each policy's rule in plain NumPy, for one layer and KV head of one sequence, oldest token first."""

import numpy as np


def greatest(scores, count) -> list[int]:
    """Places of the greatest, ascending; of equals the first."""
    return sorted(np.argsort(-np.asarray(scores, np.float64), kind="stable")[:count].tolist())


def heavy_hitter(mass, budget, recent) -> list[int]:
    """H2O, algorithm 1: the greatest accumulated scores, and the last tokens."""
    first_recent = len(mass) - recent
    return greatest(mass[:first_recent], budget - recent) + list(range(first_recent, len(mass)))


def least_recently_used(used, budget) -> list[int]:
    """Those used longest ago go first, of these the oldest."""
    order = sorted(range(len(used)), key=lambda place: (used[place], place))
    return sorted(order[len(used) - budget :])


def prompt_compress(mass, budget, observed, kernel) -> list[int]:
    """SnapKV, listing 1: what the observed tokens gave the ones before them, pooled by the kernel."""
    prefix = len(mass) - observed
    padded = np.pad(mass[:prefix].astype(np.float32), kernel // 2)
    pooled = np.zeros(prefix, np.float32)
    for nth in range(kernel):
        pooled = pooled + padded[nth : nth + prefix]
    return greatest(pooled, budget - observed) + list(range(prefix, len(mass)))


def cosine(one, other):
    return (one * other).sum(axis=-1) / (np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1))


def semantic_merge(keys, mass, budget, recent) -> list[list[int]]:
    """Runs of neighbours that become one token: those are joined by which least is lost."""
    length, mass = len(keys), np.maximum(mass, 1e-6)
    before, own = mass[:-1], mass[1:]
    loss = before * own / (before + own) * (1 - cosine(keys[:-1], keys[1:]))
    loss[max(length - recent - 1, 0) :] = np.inf
    joined = set(greatest(-loss, length - budget))
    runs = [[0]]
    for place in range(1, length):
        if place - 1 in joined:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def merged(keys, values, mass, run) -> np.ndarray:
    """The value of a run's first token, with what the others added to the output."""
    mass = np.maximum(mass, 1e-6)
    mean, first = np.average(values, axis=0, weights=mass), run[0]
    value = values[first].copy()
    for place in run[1:]:
        alike = np.exp(-(1 - cosine(keys[place], keys[first])) / 0.1)
        value += min(mass[place] / mass[first], 1) * alike * (values[place] - mean)
    return np.clip(value, values[run].min(axis=0), values[run].max(axis=0))


def sliding_window(length, window, sinks, page_size) -> int:
    """How many pages go, behind those of the sinks: what no token to come needs; the newest token stays."""
    first = -(-sinks // page_size)
    needed = range(max(length - max(window, 2) + 1, 0), length)
    pages = [
        page
        for page in range(first, length // page_size)
        if not any(page * page_size <= place < (page + 1) * page_size for place in needed)
    ]
    return len(pages)
