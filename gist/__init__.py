"""Independent subnet training: ultra-wide graph networks on whatever machine you have."""

from gist import nn
from gist.config import TrainConfig
from gist.costs.costs import Costs
from gist.costs.estimate import estimate_costs
from gist.datasets import load_dataset, prepare_dataset
from gist.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    GistError,
    MissingDependencyError,
    PartitionError,
    WorkerLostError,
)
from gist.execution.comm import local_device
from gist.federated.trainer import FederatedTrainer
from gist.graph.adjacency import Adjacency
from gist.graph.batch import BatchRecipe, BatchSource, FullGraph, GraphBatch
from gist.graph.clusters import Cluster
from gist.graph.data import GraphData
from gist.graph.layer_sampling import LADIES, FastGCN
from gist.graph.link_metrics import link_scores
from gist.graph.links import LinkData
from gist.graph.loaders import PyGLoader
from gist.graph.outline import GraphShape
from gist.history import RoundRecord, TrainResult
from gist.methods import ISTTrainer, LoFTTrainer, ResISTTrainer, SampleTrainer
from gist.methods.asyncdrop import AsyncDropTrainer
from gist.methods.tickets import FilterRanks, Ticket, find_ticket, ranking_distance
from gist.partition.builder import Layer, SpecBuilder
from gist.partition.residual_wiring import wire_blocks, wire_filters
from gist.partition.rules.registry import Rule, register_rule
from gist.partition.rules.residual import ResidualRule
from gist.partition.rules.torch import OnHeld
from gist.partition.samplers import (
    Bernoulli,
    Categorical,
    DisjointUniform,
    Fixed,
    Overlapping,
    Proportional,
    Sampler,
    Whole,
)
from gist.partition.spec import Axis, PartitionSpec
from gist.partition.wiring import partition_spec
from gist.samples.data import SampleData
from gist.samples.loader_data import LoaderData
from gist.samples.outline import SampleShape
from gist.samples.transforms import ImageTransform
from gist.trainer import GISTTrainer, SubnetTrainer

__version__ = "0.2.0"

__all__ = [
    "LADIES",
    "Adjacency",
    "AsyncDropTrainer",
    "Axis",
    "BatchRecipe",
    "BatchSource",
    "Bernoulli",
    "Categorical",
    "CheckpointError",
    "Cluster",
    "ConfigError",
    "Costs",
    "DataError",
    "DisjointUniform",
    "DivergedError",
    "FastGCN",
    "FederatedTrainer",
    "FilterRanks",
    "Fixed",
    "FullGraph",
    "GISTTrainer",
    "GistError",
    "GraphBatch",
    "GraphData",
    "GraphShape",
    "ISTTrainer",
    "ImageTransform",
    "Layer",
    "LinkData",
    "LoFTTrainer",
    "LoaderData",
    "MissingDependencyError",
    "OnHeld",
    "Overlapping",
    "PartitionError",
    "PartitionSpec",
    "Proportional",
    "PyGLoader",
    "ResISTTrainer",
    "ResidualRule",
    "RoundRecord",
    "Rule",
    "SampleData",
    "SampleShape",
    "SampleTrainer",
    "Sampler",
    "SpecBuilder",
    "SubnetTrainer",
    "Ticket",
    "TrainConfig",
    "TrainResult",
    "Whole",
    "WorkerLostError",
    "__version__",
    "estimate_costs",
    "find_ticket",
    "link_scores",
    "load_dataset",
    "local_device",
    "nn",
    "partition_spec",
    "prepare_dataset",
    "ranking_distance",
    "register_rule",
    "wire_blocks",
    "wire_filters",
]
