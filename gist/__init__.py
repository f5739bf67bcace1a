"""Independent subnet training: ultra-wide graph networks on whatever machine you have."""

from gist import nn
from gist.config import TrainConfig
from gist.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    GistError,
    MissingDependencyError,
    PartitionError,
)
from gist.graph.adjacency import Adjacency
from gist.graph.data import GraphData
from gist.graph.datasets import load_dataset, prepare_dataset
from gist.history import RoundRecord, TrainResult
from gist.partition.builder import Layer, SpecBuilder
from gist.partition.rules.registry import Rule, register_rule
from gist.partition.rules.torch import OnHeld
from gist.partition.samplers import Bernoulli, Categorical, DisjointUniform, Overlapping, Sampler
from gist.partition.spec import Axis, PartitionSpec
from gist.partition.wiring import partition_spec
from gist.trainer import GISTTrainer, SubnetTrainer

__version__ = "0.1.0"

__all__ = [
    "Adjacency",
    "Axis",
    "Bernoulli",
    "Categorical",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DisjointUniform",
    "DivergedError",
    "GISTTrainer",
    "GistError",
    "GraphData",
    "Layer",
    "MissingDependencyError",
    "OnHeld",
    "Overlapping",
    "PartitionError",
    "PartitionSpec",
    "RoundRecord",
    "Rule",
    "Sampler",
    "SpecBuilder",
    "SubnetTrainer",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "load_dataset",
    "nn",
    "partition_spec",
    "prepare_dataset",
    "register_rule",
]
