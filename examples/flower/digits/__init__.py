"""A Flower app: an MLP on handwritten digits, trained by AsyncDrop."""
