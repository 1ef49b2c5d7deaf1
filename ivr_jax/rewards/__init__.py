"""Rewards as pure array functions over batched trajectories (`functions.py`), and the judge's calls (`judge.py`)."""
