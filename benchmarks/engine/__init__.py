"""The search and training, measured without a service."""
