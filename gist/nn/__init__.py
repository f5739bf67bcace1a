"""Reference models: GCN, GraphSAGE (both forms) and GAT, and their fast layers."""

from gist.nn.conv import GCNConv, SAGEConcatConv, SAGEConv
from gist.nn.dropout import Dropout
from gist.nn.models import GAT, GCN, GraphSAGE

__all__ = ["GAT", "GCN", "Dropout", "GCNConv", "GraphSAGE", "SAGEConcatConv", "SAGEConv"]
