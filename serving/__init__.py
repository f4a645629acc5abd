"""The engine: bundle, trie, search, cache and batcher. Knows nothing of HTTP or of data sets."""

# The one statement of the version: pyproject.toml and the service read it here.
__version__ = "0.2.0"
