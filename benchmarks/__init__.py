"""Measurements: each module prints a table and writes one JSON file under results/."""
