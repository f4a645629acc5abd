"""The way of one request: admission, encoder states per user, and the batch that answers it."""
