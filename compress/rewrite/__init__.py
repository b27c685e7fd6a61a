"""Passes that change what a network computes, for training or fine-tuning afterwards."""
