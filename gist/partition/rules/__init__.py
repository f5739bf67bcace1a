"""Rules: how the dims of each layer type follow its units, and how the layer is narrowed."""
