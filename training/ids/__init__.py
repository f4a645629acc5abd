"""Semantic IDs: embeddings, quantizers, unique codes per item."""
