"""What experiments on a kind of data are made of by name: models, methods, settings."""
