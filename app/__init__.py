"""The service: HTTP in front of serving. Routes, schemas, settings, metrics, security and the playground page."""
