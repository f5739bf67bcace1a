"""Reference models and their fast layers.

GCN, GraphSAGE (both forms) and GAT for graphs; MLP, pre-activation ResNet and VGG for independent
samples.
"""

from gist.nn.bag import BagLinear
from gist.nn.conv import GCNConv, SAGEConcatConv, SAGEConv
from gist.nn.dropout import Dropout
from gist.nn.mlp import MLP
from gist.nn.models import GAT, GCN, GraphSAGE
from gist.nn.resnet import (
    PreActResNet,
    preact_resnet8,
    preact_resnet18,
    preact_resnet20,
    preact_resnet32,
    preact_resnet34,
    preact_resnet101,
    preact_resnet152,
    preact_resnet200,
)
from gist.nn.vgg import VGG, vgg11, vgg13, vgg16

__all__ = [
    "GAT",
    "GCN",
    "MLP",
    "VGG",
    "BagLinear",
    "Dropout",
    "GCNConv",
    "GraphSAGE",
    "PreActResNet",
    "SAGEConcatConv",
    "SAGEConv",
    "preact_resnet8",
    "preact_resnet18",
    "preact_resnet20",
    "preact_resnet32",
    "preact_resnet34",
    "preact_resnet101",
    "preact_resnet152",
    "preact_resnet200",
    "vgg11",
    "vgg13",
    "vgg16",
]
