"""The constrained beam search, on any runtime or as one CUDA graph."""
