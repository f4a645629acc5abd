"""The engine: bundle, trie, search, cache and batcher. Knows nothing of HTTP or of data sets."""
