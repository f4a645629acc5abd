"""Data folders: read, made, downloaded, split."""
