"""Graphs as input: anything that holds nodes and edges becomes a :class:`GraphData`."""
