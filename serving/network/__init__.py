"""The network, and the runtimes that run its encoder and its decoder step."""
