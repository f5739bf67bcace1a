"""Reference models: GCN, GraphSAGE (both forms) and GAT, and their fast convolutions."""

from gist.nn.conv import GCNConv, SAGEConcatConv, SAGEConv
from gist.nn.models import GAT, GCN, GraphSAGE

__all__ = ["GAT", "GCN", "GCNConv", "GraphSAGE", "SAGEConcatConv", "SAGEConv"]
