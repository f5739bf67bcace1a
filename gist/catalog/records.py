"""What a dataset's card holds, of a graph or of independent samples."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

from gist.metrics import Metric, Task

MAIN = "main"
"""Name of the form of a dataset's raw files that its ``checksums`` are of."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Number of nodes or samples in each split; None where it is not known."""

    train: int | None
    val: int | None
    test: int | None


@dataclass(frozen=True, kw_only=True)
class PaperResult:
    """One row of a table of the GIST paper (Wolfe et al., arXiv 2102.10424).

    Attributes:
        table: Number of the table.
        model: Name of the reference model.
        layers: Number of layers.
        hidden: Width of each hidden layer.
        accuracy: Test accuracy or F1 in percent for each number of subnets; 1 is the full model.
    """

    table: int
    model: str
    layers: int
    hidden: int
    accuracy: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Settings and results of the GIST paper; None for a setting that it does not give.

    Attributes:
        epochs: Total budget.
        local_steps: Steps between two merges.
        clusters: Parts the graph was cut into; None for full batches.
        clusters_per_batch: Clusters of a batch.
        lr: Learning rate.
        dropout: Share of activations dropped.
        results: Rows of its tables.
    """

    epochs: int
    local_steps: int
    clusters: int | None = None
    clusters_per_batch: int | None = None
    lr: float | None = None
    dropout: float | None = None
    results: list[PaperResult]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings to start from, by the names of model and trainer options.

    Attributes:
        model: Name of the reference model.
        hidden: Width of each hidden layer.
        layers: Number of layers.
        norm: Normalisation after each hidden layer; None for none.
        dropout: Share of activations dropped.
        lr: Learning rate.
        weight_decay: Weight decay.
        schedule: Name of the learning-rate schedule.
        epochs: Total budget, split over the subnets.
        local_steps: Steps between two merges.
        clusters: Parts to cut the graph into; None trains on the whole graph.
        clusters_per_batch: Clusters of a batch.
        inductive: Whether to train on the subgraph of the training nodes alone.
        num_subnets: What to train with these settings where no number of subnets is asked for, as
            ``[share, m]`` of each phase; None leaves it to :class:`~gist.config.TrainConfig`.
    """

    model: str
    hidden: int
    layers: int
    norm: str | None
    dropout: float
    lr: float
    weight_decay: float
    schedule: str
    epochs: int
    local_steps: int
    clusters: int | None = None
    clusters_per_batch: int = 1
    inductive: bool = False
    num_subnets: list[list[float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Recommended settings, and what changes from so many subnets on."""

    defaults: TrainingSettings
    subnets: dict[int, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Settings that may be recommended for samples, by the names of model and trainer options.

    Attributes:
        model: Name of the reference model.
        hidden: Width of each hidden layer.
        layers: Number of layers.
        norm: Normalisation after each hidden layer; None for none.
        dropout: Share of activations dropped.
        optimizer: Name of the optimiser.
        lr: Learning rate.
        weight_decay: Weight decay.
        schedule: Name of the learning-rate schedule.
        epochs: Total budget, split over the subnets.
        local_steps: Steps between two merges.
        batch_size: Samples of a step.
        shards: Whether each subnet sees training samples of its own alone.
        optimizer_state: What becomes of the optimiser's state between rounds.
        stages: Of ResIST: parts of the network whose blocks are dealt.
        min_blocks: Of ResIST: blocks of a stage that each subnet has at least.
        warmup_rounds: Of ResIST: rounds in which every subnet has all blocks.
    """

    model: str
    hidden: int | None = None
    layers: int | None = None
    norm: str | None = None
    dropout: float | None = None
    optimizer: str | None = None
    lr: float | None = None
    weight_decay: float | None = None
    schedule: str | None = None
    epochs: int | None = None
    local_steps: int | None = None
    batch_size: int | None = None
    shards: bool | None = None
    optimizer_state: str | None = None
    stages: list[str] | None = None
    min_blocks: int | None = None
    warmup_rounds: int | None = None


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Recommended settings of one method, and what changes from so many subnets on.

    Attributes:
        defaults: Some of :class:`SampleSettings`; those left out are left to model and trainer.
        subnets: Changes of them.
    """

    defaults: dict[str, Any]
    subnets: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of one dataset.

    Attributes:
        name: As :func:`gist.load_dataset` takes it; also the name of the file.
        title: One line.
        source: Where the data comes from.
        licence: Under what terms.
        citation: Whom to cite.
        classes: Number of output columns.
        task: Kind of labels.
        metric: What is reported.
        split: Nodes or samples in each split.
        checksums: Raw files, as paths below the dataset's folder, with their SHA-256; None where
            it is not known. Empty for generated data.
        note: Anything else worth knowing.
        folders: Names that the dataset's folder may have below a data folder; downloads go to the
            first.
        urls: What to download, by where it goes below the dataset's folder: a file; or, where that
            ends in ``/``, an archive to unpack there. A URL that ends in ``/`` as well stands for
            all raw files there.
        forms: Other sets of raw files that will do in place of those of ``checksums``, by name and
            in order of preference, each like ``checksums``.
    """

    name: str
    title: str
    source: str
    licence: str
    citation: str
    classes: int
    task: Task
    metric: Metric
    split: Split
    checksums: dict[str, str | None]
    note: str
    folders: list[str] = field(default_factory=list)
    urls: dict[str, str] = field(default_factory=dict)
    forms: dict[str, dict[str, str | None]] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """Raw files, as paths below a data folder; none for generated data."""
        return [f"{self.folders[0]}/{file}" for file in self.checksums]

    def in_forms(self) -> dict[str, Self]:
        """The card once for each form of the raw files, :data:`MAIN` first, as of that alone."""
        every = {MAIN: self.checksums, **self.forms}
        return {form: replace(self, checksums=sums, forms={}) for form, sums in every.items()}


@dataclass(frozen=True, kw_only=True)
class GraphCard(Card):
    """What is known of a graph.

    Attributes:
        nodes: Number of nodes.
        edges: Number of directed edges as stored: an undirected edge counts twice.
        features: Number of features.
        edge_features: Number of features of an edge.
        paper: The GIST paper's settings and results, None where it has none.
        settings: Where to start training from.
    """

    nodes: int
    edges: int
    features: int
    edge_features: int = 0
    paper: Paper | None
    settings: Settings

    def settings_for(self, num_subnets: int) -> dict[str, Any]:
        """Recommended settings for m subnets: the defaults, changed as the card says.

        Changes apply from their number of subnets up to the next one listed: with changes for 2
        and 8, four subnets take those for 2 and sixteen those for 8.

        Args:
            num_subnets: m.

        Returns:
            Values by setting name.
        """
        settings = dict(vars(self.settings.defaults))
        del settings["num_subnets"]  # what this is asked for is known
        return settings | _from_m_on(self.settings.subnets, num_subnets)


@dataclass(frozen=True, kw_only=True)
class SampleCard(Card):
    """What is known of independent samples.

    Attributes:
        samples: Number of samples.
        shape: Of one sample: ``[F]`` features, or ``[C, H, W]`` of an image.
        settings: Where to start training from, by method.
    """

    samples: int
    shape: list[int]
    settings: dict[str, MethodSettings] = field(default_factory=dict)

    @property
    def split_sizes(self) -> tuple[int, int, int]:
        """Samples for training, validation and testing."""
        train, val, test = self.split.train, self.split.val, self.split.test
        assert train is not None, "read_card saw to it"
        assert val is not None
        assert test is not None
        return train, val, test

    def settings_for(self, method: str, num_subnets: int) -> dict[str, Any]:
        """Recommended settings of a method for m subnets, changed as for a graph.

        Args:
            method: Its name.
            num_subnets: m.

        Returns:
            Values by setting name; none where the card has none for this method.
        """
        if method not in self.settings:
            return {}
        settings = self.settings[method]
        return settings.defaults | _from_m_on(settings.subnets, num_subnets)


def _from_m_on(changes: dict[int, dict[str, Any]], num_subnets: int) -> dict[str, Any]:
    """Those of the greatest number of subnets listed, up to this one."""
    listed = [m for m in changes if m <= num_subnets]
    return changes[max(listed)] if listed else {}
