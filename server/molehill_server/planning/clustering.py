"""Groups of clients whose changes point the same way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform


def distances(directions: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 - cosine of every two of some unit vectors ``[K, P]``, ``[K, K]`` with a diagonal of 0."""
    apart = np.clip(1.0 - directions @ directions.T, 0.0, 2.0)
    np.fill_diagonal(apart, 0.0)
    return (apart + apart.T) / 2


def clusters(apart: NDArray[np.float64], most: int) -> tuple[NDArray[np.int64], float]:
    """Agglomerative clusters by average linkage, as many as have the best mean silhouette.

    Args:
        apart: Distances ``[K, K]``.
        most: Most clusters.

    Returns:
        The cluster of each, from 0 in the order of their first members, and the silhouette; one cluster, and 0, where
        there are fewer than three or nothing to tell them apart by.
    """
    count = len(apart)
    if count < 3 or most < 2:
        return np.zeros(count, np.int64), 0.0
    tree = linkage(squareform(apart, checks=False), "average")
    tried = [fcluster(tree, number, "maxclust") for number in range(2, min(most, count - 1) + 1)]
    scores = [silhouette(apart, labels) for labels in tried]
    best = int(np.argmax(scores))
    if scores[best] <= 0:
        return np.zeros(count, np.int64), 0.0
    _, first, place = np.unique(tried[best], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[place].astype(np.int64), scores[best]


def silhouette(apart: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean over members of ``(b - a) / max(a, b)`` (Rousseeuw 1987): a to their own cluster, b to the nearest other.

    A member that is alone in its cluster counts 0; so do all where there is one cluster.
    """
    names = np.unique(labels)
    if len(names) < 2:
        return 0.0
    member = labels[None, :] == names[:, None]  # [clusters, K]
    sizes = member.sum(1)
    own = np.searchsorted(names, labels)
    sums = apart @ member.T  # [K, clusters]
    at = np.arange(len(labels))
    a = sums[at, own] / np.maximum(sizes[own] - 1, 1)
    means = sums / sizes
    means[at, own] = np.inf
    b = means.min(1)
    widest = np.maximum(a, b)
    each = np.where((sizes[own] > 1) & (widest > 0), (b - a) / np.where(widest > 0, widest, 1.0), 0.0)
    return float(each.mean())
