"""planish: prune, quantize and export a trained PyTorch model to a named device, and profile it there."""

__version__ = "0.1.0"
