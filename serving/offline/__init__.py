"""Scoring of many users from file to file."""
