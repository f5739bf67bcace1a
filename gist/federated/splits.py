"""Who has which training samples.

Shape legend: ``N`` samples, ``K`` clients, ``C`` classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gist.errors import ConfigError, DataError, one_of, require_count
from gist.partition.streams import stream_seed

_DRAWS = 100
"""How often, at most, a split is drawn until every client has enough samples."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Split(ABC):
    """Deals samples to clients; subclasses say by which rule.

    Attributes:
        min_samples: Samples that every client has at least.

    Raises:
        ConfigError: a value that cannot be used.
    """

    min_samples: int = 1

    def __post_init__(self) -> None:
        require_count("min_samples", self.min_samples)

    def split(self, labels: Tensor, num_clients: int, *, seed: int) -> tuple[Tensor, ...]:
        """The samples of every client: a function of the arguments alone.

        Args:
            labels: ``[N]``, the class of every sample; ``[N, ...]`` where the rule does not look
                at them.
            num_clients: ``K``.
            seed: Of all that is drawn.

        Returns:
            ``K`` vectors of int64 positions in ``labels``, ascending, on the CPU: views of one
            tensor that holds every position once.

        Raises:
            ConfigError: some client would have fewer samples than ``min_samples``.
            DataError: labels that the rule cannot go by.
        """
        require_count("num_clients", num_clients)
        if len(labels) < num_clients * self.min_samples:
            raise self._too_few(len(labels), num_clients, len(labels) // num_clients)
        generator = np.random.default_rng(stream_seed("clients", seed))
        owner = self.deal(labels, num_clients, generator)
        sizes = np.bincount(owner, minlength=num_clients)
        if sizes.min() < self.min_samples:
            raise self._too_few(len(labels), num_clients, int(sizes.min()))
        order = torch.from_numpy(np.argsort(owner, kind="stable"))
        return torch.split(order, sizes.tolist())

    @abstractmethod
    def deal(self, labels: Tensor, num_clients: int, generator: np.random.Generator) -> Numbers:
        """The client of every sample: ``[N]`` in ``[0, K)``."""

    def _too_few(self, samples: int, num_clients: int, smallest: int) -> ConfigError:
        return ConfigError(
            f"{type(self).__name__} leaves clients with too few samples",
            got=f"{smallest:,} at the smallest of {num_clients:,} clients, {samples:,} in all",
            expected=f"min_samples={self.min_samples}",
            remedy="fewer clients",
        )


@dataclass(frozen=True, kw_only=True)
class IID(Split):
    """Uniformly at random, in sizes that differ by at most one; any kind of labels."""

    def deal(self, labels: Tensor, num_clients: int, generator: np.random.Generator) -> Numbers:
        """See :meth:`Split.deal`."""
        return generator.permutation(np.arange(len(labels)) % num_clients)


@dataclass(frozen=True, kw_only=True)
class LabelShards(Split):
    """Every client has a few shards of the samples sorted by label (McMahan et al., 2017, sec. 3).

    Samples, in random order within a label, are cut into ``K * per_client`` shards whose sizes
    differ by at most one, and each client is dealt ``per_client`` of these at random. A shard no
    larger than the smallest class has at most two labels.

    Attributes:
        per_client: Shards of a client.
    """

    per_client: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("per_client", self.per_client)

    def deal(self, labels: Tensor, num_clients: int, generator: np.random.Generator) -> Numbers:
        """See :meth:`Split.deal`."""
        order = _by_class(_classes(labels), generator)
        shards = num_clients * self.per_client
        client = generator.permutation(np.arange(shards) % num_clients)
        owner = np.empty(len(order), dtype=np.int64)
        owner[order] = client[np.arange(len(order)) * shards // len(order)]
        return owner


@dataclass(frozen=True, kw_only=True)
class Dirichlet(Split):
    """Classes in shares that are drawn from a Dirichlet distribution.

    Balanced (Hsu et al., 2019), all ``K`` clients have ``n = N / K`` samples, rounded. Each draws
    class shares ``q ~ Dir(α p)``, where ``p`` are those of all samples, and takes ``n q`` samples,
    rounded at random to ``n`` in all. What a class has too few of is taken from those that are
    left, by their shares. Clients choose one after the other, in random order.

    Not balanced (Yurochkin et al., 2019), every class is cut into shares ``Dir(α, ..., α)`` of the
    ``K`` clients, whose sizes then differ widely. Where a client has fewer samples than
    ``min_samples``, all is drawn anew, up to 100 times.

    So the same α is another thing: with ``C`` classes of one size, the class shares of a balanced
    client have concentrations ``α / C``, and not ``α``.

    Attributes:
        alpha: α. Large: clients are alike; small: each has one class, or a few.
        balanced: Whether all clients have as many samples.
    """

    alpha: float = 0.5
    balanced: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not number or not 0 < self.alpha < float("inf"):
            raise ConfigError("alpha must be a positive number", got=repr(self.alpha))
        if not isinstance(self.balanced, bool):
            raise ConfigError("balanced must be True or False", got=repr(self.balanced))

    def deal(self, labels: Tensor, num_clients: int, generator: np.random.Generator) -> Numbers:
        """See :meth:`Split.deal`."""
        classes = _classes(labels)
        counts = np.bincount(classes)
        draw = self._client_by_client if self.balanced else self._class_by_class
        taken = draw(counts, num_clients, generator)
        owner = np.empty(len(classes), dtype=np.int64)
        clients = np.tile(np.arange(num_clients), len(counts))
        owner[_by_class(classes, generator)] = np.repeat(clients, taken.T.ravel())
        return owner

    def _client_by_client(
        self, counts: Numbers, num_clients: int, generator: np.random.Generator
    ) -> Numbers:
        """``[K, C]``: samples that every client takes of every class, which has ``counts``."""
        concentration = self.alpha * counts / counts.sum()
        taken = np.zeros((num_clients, len(counts)), dtype=np.int64)
        rest = counts.copy()
        more = counts.sum() % num_clients
        for place, client in enumerate(generator.permutation(num_clients)):
            # log Gamma(a) = log Gamma(a + 1) + log(U) / a: in logarithms no share vanishes, so that
            # those of the classes that are left can always be normalised.
            log_share = np.log(generator.standard_gamma(concentration + 1))
            log_share -= generator.standard_exponential(len(counts)) / concentration
            missing = counts.sum() // num_clients + (place < more)
            while missing:
                left = generator.permutation(np.flatnonzero(rest))
                share = np.exp(log_share[left] - log_share[left].max())
                ends = share.cumsum() * (missing / share.sum())
                ends[-1] = missing
                drawn = np.diff(np.floor(ends + generator.random()), prepend=0).astype(np.int64)
                drawn = np.minimum(drawn, rest[left])
                taken[client, left] += drawn
                rest[left] -= drawn
                missing -= drawn.sum()
        return taken

    def _class_by_class(
        self, counts: Numbers, num_clients: int, generator: np.random.Generator
    ) -> Numbers:
        """As :meth:`_client_by_client`."""
        smallest = 0
        for _ in range(_DRAWS):
            shares = generator.dirichlet(np.full(num_clients, self.alpha), size=len(counts))
            ends = np.floor(shares.cumsum(axis=1) * counts[:, None]).astype(np.int64)
            ends[:, -1] = counts
            taken = np.diff(ends, axis=1, prepend=0).T
            smallest = max(smallest, int(taken.sum(axis=1).min()))
            if smallest >= self.min_samples:
                return taken
        raise ConfigError(
            f"{_DRAWS} draws gave no split in which every client has enough samples",
            got=f"at most {smallest:,} at the smallest of {num_clients:,} clients",
            expected=f"min_samples={self.min_samples}",
            remedy="balanced=True, a larger alpha, or fewer clients",
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Given(Split):
    """A split that is there already.

    Attributes:
        parts: The positions of every client's samples among the training samples, from 0 on; of a
            graph, the numbers of every client's nodes among all. Each is in one of them.
    """

    parts: Sequence[Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = tuple(torch.as_tensor(part, dtype=torch.int64).cpu() for part in self.parts)
        object.__setattr__(self, "parts", parts)

    def __repr__(self) -> str:
        return f"Given({len(self.parts):,} clients, {sum(map(len, self.parts)):,} samples)"

    def deal(self, labels: Tensor, num_clients: int, generator: np.random.Generator) -> Numbers:
        """See :meth:`Split.deal`."""
        del generator
        if len(self.parts) != num_clients:
            raise ConfigError(
                "the split was given for another number of clients",
                got=f"{len(self.parts):,} parts",
                expected=f"{num_clients:,}",
                remedy="one part for each of the clients",
            )
        return owners_of(self.parts, len(labels)).numpy()


SPLITS: Mapping[str, Split] = {
    "iid": IID(),
    "dirichlet": Dirichlet(),
    "label-shards": LabelShards(),
}
"""Splits by name."""


_NUMBERS: Mapping[str, tuple[str, type]] = {
    "dirichlet": ("alpha", float),
    "label-shards": ("per_client", int),
}
"""What a number behind the name of a split is."""


def make_split(split: str | Split, *, others: Sequence[str] = ()) -> Split:
    """A split by name, or the given one.

    A number may follow the name: of label shards how many a client has, ``"label-shards:5"``; of
    the Dirichlet split its α, ``"dirichlet:0.1"``.

    Args:
        split: The name, or a split.
        others: Names that are splits elsewhere, to be listed.

    Raises:
        ConfigError: an unknown name, or a number that the split cannot have.
    """
    if isinstance(split, Split):
        return split
    if isinstance(split, Sequence) and not isinstance(split, str):
        raise ConfigError(
            "these are no split", got=f"a {type(split).__name__}", remedy="Given(parts=...)"
        )
    name, colon, number = split.partition(":") if isinstance(split, str) else (split, "", "")
    one_of("split", name, [*SPLITS, *others])
    if not colon:
        return SPLITS[name]
    if name not in _NUMBERS:
        raise ConfigError("this split has no number", got=repr(split), expected=name)
    setting, kind = _NUMBERS[name]
    try:
        value = kind(number)
    except ValueError as error:
        raise ConfigError(
            f"a split's {setting} cannot be read", got=repr(split), expected=f"{name}:NUMBER"
        ) from error
    return replace(SPLITS[name], **{setting: value})


def in_turn(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The positions of all clients one after the other, and the client of each, on the CPU."""
    sizes = torch.tensor([len(part) for part in parts])
    clients = torch.arange(len(parts)).repeat_interleave(sizes)
    return torch.cat([part.cpu() for part in parts]), clients


def owners_of(parts: Sequence[Tensor], num_samples: int) -> Tensor:
    """The client of every sample: ``[N]`` int64.

    Args:
        parts: Positions of every client's samples.
        num_samples: ``N``.

    Raises:
        DataError: a position that is out of range, in several parts, or in none.
    """
    positions, clients = in_turn(parts)
    inside = (positions >= 0) & (positions < num_samples)
    times = torch.bincount(positions[inside], minlength=num_samples)
    if not (bool(inside.all()) and bool((times == 1).all())):
        raise DataError(
            "the parts of the clients do not hold every sample once",
            got=f"{int((~inside).sum()):,} positions out of range, {int((times == 0).sum()):,} in "
            f"no part, {int((times > 1).sum()):,} in several",
            expected=f"0 to {num_samples - 1:,}, each in one part",
            remedy="of samples, count those of the training split alone; of a graph, all nodes",
        )
    owner = torch.empty(num_samples, dtype=torch.int64)
    owner[positions] = clients
    return owner


def label_counts(labels: Tensor, parts: Sequence[Tensor], num_classes: int) -> Tensor:
    """How many samples of each class every client has: ``[K, C]`` int64, on the CPU.

    Args:
        labels: ``[N]`` class numbers.
        parts: Positions of every client's samples.
        num_classes: ``C``.

    Raises:
        DataError: labels that are no class numbers below ``C``.
    """
    positions, clients = in_turn(parts)
    own = labels.cpu()[positions]
    if own.dim() != 1 or bool(((own < 0) | (own >= num_classes)).any()):
        raise DataError(
            "labels are no class numbers",
            got=f"{labels.dtype} of shape {tuple(labels.shape)}",
            expected=f"[N] whole numbers from 0 to {num_classes - 1}",
        )
    keys = clients * num_classes + own.long()
    return torch.bincount(keys, minlength=len(parts) * num_classes).view(-1, num_classes)


def _classes(labels: Tensor) -> Numbers:
    """``[N]``: the class of every sample, numbered from 0 without gaps, in the order of labels.

    Raises:
        DataError: samples that have not one label each.
    """
    if labels.dim() != 1 or bool(labels.isnan().any()):
        raise DataError(
            "samples can be split by their labels only if each has one",
            got=f"{labels.dtype} of shape {tuple(labels.shape)}"
            + (", with NaN" if labels.dim() == 1 else ""),
            expected="[N] class numbers",
            remedy="IID(), or Given(parts=...)",
        )
    return np.unique(labels.detach().cpu().numpy(), return_inverse=True)[1].astype(np.int64)


def _by_class(classes: Numbers, generator: np.random.Generator) -> Numbers:
    """Positions in order of class, in random order within each."""
    shuffled = generator.permutation(len(classes))
    return shuffled[np.argsort(classes[shuffled], kind="stable")]
