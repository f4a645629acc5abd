"""The clients of the service, written from its OpenAPI document: `python -m clients`, or `make clients`."""
