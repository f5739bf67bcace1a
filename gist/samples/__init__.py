"""Independent samples as input: images, feature vectors and bags become a :class:`SampleData`."""
