"""What people install streamrec for: the `streamrec` command (`__main__.py`) and its service's client (`client.py`).

Importing this package imports nothing else of streamrec, so a shop's process stays free of the engine."""
