"""The demo: a trained Fashion-MNIST network and a slice of its data, taken through the whole pipeline."""
