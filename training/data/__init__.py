"""Data folders: read, made, downloaded, split."""

from training.data.read import DataError, Dataset, Items, read_data, read_items

__all__ = ["DataError", "Dataset", "Items", "read_data", "read_items"]
