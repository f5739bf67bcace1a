"""The partition engine: tensors and index sets only; no graphs, no data, no processes."""
