"""Stored trajectories -> token examples -> packed batches.

    store.py       the dataset of trajectories on disk, images stored once
    examples.py    trajectories -> token examples (one pass of the image tokenizer), stored by mode
    pipeline.py    Grain: shuffle, mix by mode, pack, batch; every iterator's state can be saved
"""
