"""Ways to run the network's two passes, `encode` and `step`, behind one small interface."""
