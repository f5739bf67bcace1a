"""Graphs that need no download: one of handwritten digits, and random ones of any size.

Shape legend: ``N`` nodes, ``F`` features, ``C`` classes, ``K`` undirected edges.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gist.errors import ConfigError
from gist.graph.data import GraphData

_ROUNDS = 100  # redraws of self loops and duplicates before a graph counts as too dense


def digits(*, neighbours: int = 10, train_per_class: int = 5) -> GraphData:
    """The nearest-neighbour graph of scikit-learn's 1,797 handwritten digits (8 x 8 pixels).

    Two digits are joined where either is among the ``neighbours`` nearest of the other (Euclidean
    distance between images, ties broken by index). Features are the 64 pixels scaled to [0, 1].
    The split is fixed: few training nodes for each class, 500 for validation, the rest for testing.

    Args:
        neighbours: Nearest neighbours that each digit chooses.
        train_per_class: Training nodes for each of the 10 classes.

    Raises:
        ConfigError: a setting is out of range.
    """
    from sklearn.datasets import load_digits  # takes a second to import

    _within("neighbours", neighbours, 1, 1796, whole=True)
    _within("train_per_class", train_per_class, 1, 100, whole=True)
    pixels, y = load_digits(return_X_y=True)
    squares = (pixels**2).sum(axis=1)
    # whole numbers up to 16: distances are exact, so their order is the same on every machine
    distance = squares[:, None] + squares - 2 * pixels @ pixels.T
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :neighbours]
    joined = np.zeros(distance.shape, dtype=bool)
    joined[np.arange(len(y))[:, None], nearest] = True
    order = np.random.default_rng(0).permutation(len(y))
    train = np.concatenate([order[y[order] == c][:train_per_class] for c in range(10)])
    rest = order[~np.isin(order, train)]
    return GraphData.from_edges(
        np.stack((joined | joined.T).nonzero()),
        pixels / 16,
        y,
        train=train,
        val=rest[:500],
        test=rest[500:],
        name="digits",
    )


def csbm(
    *,
    num_nodes: int = 20_000,
    num_features: int = 100,
    num_classes: int = 47,
    average_degree: float = 20.0,
    homophily: float = 0.6,
    degree_exponent: float | None = 2.5,
    feature_signal: float = 1.0,
    train_share: float = 0.5,
    val_share: float = 0.25,
    seed: int = 0,
) -> GraphData:
    """A random graph with classes: the degree-corrected contextual stochastic block model.

    The contextual model (Deshpande, Sen, Montanari & Mossel, NeurIPS 2018) ties both the edges and
    Gaussian features to the class of a node; degree correction (Karrer & Newman, Phys. Rev. E 83,
    2011) gives each node a propensity, here with a power-law tail, in proportion to which it is
    drawn as an endpoint. Classes are of equal size. Exactly ``num_nodes * average_degree / 2``
    undirected edges are drawn, a share ``homophily`` of them within a class; self loops and
    duplicates are drawn again, and propensities are cut at the structural cut-off
    ``sqrt(num_nodes / average_degree)``, above which a simple graph cannot have them.

    Args:
        num_nodes: ``N``, at least two per class.
        num_features: ``F``.
        num_classes: ``C``, at least 2.
        average_degree: Mean number of neighbours.
        homophily: Share of edges within a class, 0 to 1; ``1 / num_classes`` tells nothing.
        degree_exponent: Exponent above 2 of the degrees' power law; None for equal propensities.
        feature_signal: Distance of class centres from the origin, in standard deviations of the
            features' noise; 0 for features that tell nothing.
        train_share: Share of nodes for training.
        val_share: Share of nodes for validation; the rest is for testing.
        seed: The graph depends on this and the other arguments alone.

    Returns:
        A symmetric graph of ``num_nodes * average_degree`` directed edges with features
        ``x = centre of class + standard normal noise``.

    Raises:
        ConfigError: a setting is out of range, or the graph would be too dense for simple edges.
    """
    _within("num_classes", num_classes, 2, np.inf, whole=True)
    _within("num_nodes", num_nodes, 2 * num_classes, np.inf, whole=True)
    _within("num_features", num_features, 1, np.inf, whole=True)
    _within("average_degree", average_degree, 2 / num_nodes, num_nodes - 1)
    _within("homophily", homophily, 0, 1)
    _within("feature_signal", feature_signal, 0, np.inf)
    _within("seed", seed, 0, np.inf, whole=True)
    if degree_exponent is not None:
        _within("degree_exponent", degree_exponent, np.nextafter(2, 3), np.inf)
    split = [round(num_nodes * share) for share in (train_share, val_share)]
    if min(*split, num_nodes - sum(split)) < 1:
        raise ConfigError(
            "train_share and val_share must leave at least one node for each split",
            got=f"{train_share} and {val_share} of {num_nodes} nodes",
            expected="positive shares with a sum below 1",
        )

    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num_nodes) % num_classes)
    propensity = np.ones(num_nodes)
    if degree_exponent is not None:
        propensity = 1 + rng.pareto(degree_exponent - 1, num_nodes)
        cut = np.sqrt(num_nodes / average_degree)
        propensity = np.minimum(propensity / propensity.mean(), max(cut, 1.0))
    draw = _Endpoints(labels, propensity, num_classes)
    total = max(round(num_nodes * average_degree / 2), 1)
    within = round(total * homophily)
    pairs = np.concatenate(
        [draw.edges(rng, within, same=True), draw.edges(rng, total - within, same=False)], axis=1
    )
    centres = rng.standard_normal((num_classes, num_features), dtype=np.float32)
    centres *= np.float32(feature_signal) / np.linalg.norm(centres, axis=1, keepdims=True)
    x = rng.standard_normal((num_nodes, num_features), dtype=np.float32)
    x += centres[labels]
    train, val, test = np.split(rng.permutation(num_nodes), np.cumsum(split))
    return GraphData.from_edges(
        np.concatenate([pairs, pairs[::-1]], axis=1),
        torch.from_numpy(x),
        labels,
        train=train,
        val=val,
        test=test,
        num_classes=num_classes,
        name="csbm",
    )


def arxiv_like(*, seed: int = 0) -> GraphData:
    """A stand-in of the shape of ogbn-arxiv (Hu et al., NeurIPS 2020), drawn by :func:`csbm`.

    Its numbers of nodes, edges, features and classes, and the sizes of its split, are exactly those
    of ogbn-arxiv made symmetric. Nothing else is: classes are of equal size, the split is random,
    and homophily and features are chosen so that a GCN is neither useless nor perfect. What is
    measured on it says nothing about accuracy on ogbn-arxiv.

    Args:
        seed: The graph depends on this alone.
    """
    nodes, edges, train, val = 169_343, 2_315_598, 90_941, 29_799
    graph = csbm(
        num_nodes=nodes,
        num_features=128,
        num_classes=40,
        average_degree=edges / nodes,
        homophily=0.45,
        feature_signal=1.2,
        train_share=train / nodes,
        val_share=val / nodes,
        seed=seed,
    )
    return replace(graph, name="arxiv-like")


class _Endpoints:
    """Draws nodes of given classes in proportion to their propensity, and edges between them."""

    def __init__(self, labels: np.ndarray, propensity: np.ndarray, num_classes: int) -> None:
        self.num_nodes, self.num_classes = len(labels), num_classes
        self.by_class = np.argsort(labels, kind="stable")
        self.start = np.searchsorted(labels[self.by_class], np.arange(num_classes + 1))
        self.cumulative = np.concatenate([[0.0], np.cumsum(propensity[self.by_class])])

    def nodes(self, rng: np.random.Generator, classes: np.ndarray) -> np.ndarray:
        """One node of each class in ``classes`` [K]; inverts the cumulative propensity."""
        first, end = self.start[classes], self.start[classes + 1]
        low, high = self.cumulative[first], self.cumulative[end]
        point = low + (high - low) * rng.random(len(classes))
        position = np.searchsorted(self.cumulative, point, side="right") - 1
        chosen: np.ndarray = self.by_class[np.clip(position, first, end - 1)]
        return chosen

    def edges(self, rng: np.random.Generator, count: int, *, same: bool) -> np.ndarray:
        """``[2, count]`` different pairs of different nodes, of the same class or of two."""
        found = np.empty(0, dtype=np.int64)
        for _ in range(_ROUNDS):
            if len(found) >= count:
                return np.stack(np.divmod(found[:count], self.num_nodes))
            want = int(1.1 * (count - len(found))) + 16
            classes = rng.integers(self.num_classes, size=want)
            other = 0 if same else rng.integers(1, self.num_classes, size=want)
            one = self.nodes(rng, classes)
            two = self.nodes(rng, (classes + other) % self.num_classes)
            low, high = np.minimum(one, two), np.maximum(one, two)
            keys = np.concatenate([found, (low * self.num_nodes + high)[low != high]])
            _, first = np.unique(keys, return_index=True)
            found = keys[np.sort(first)]  # in the order drawn: a cut favours nobody
        raise ConfigError(
            f"the graph is too dense: no {count:,} different edges "
            f"{'within a class' if same else 'between classes'} were found",
            got=f"{len(found):,} after {_ROUNDS} rounds of drawing",
            remedy="lower average_degree, move homophily to the middle, or raise degree_exponent",
        )


def _within(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    """Refuses a setting that is no number (with ``whole``: no int) in ``[low, high]``."""
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        limit = f"from {low:g} to {high:g}" if high < np.inf else f"of at least {low:g}"
        raise ConfigError(f"{name} is out of range", got=repr(value), expected=f"{kind} {limit}")
