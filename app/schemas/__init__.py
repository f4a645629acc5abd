"""Bodies of requests and responses, one module per group of routes; those that several need are in `common`."""
