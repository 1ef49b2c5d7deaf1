"""Stored trajectories -> token examples -> packed batches.

    store.py       the dataset of trajectories on disk, images stored once
    card.py        what a dataset holds, counted: README.md and card.json beside it
    tfds_builder.py    the same dataset as TensorFlow Datasets tables
    examples.py    trajectories -> token examples (one pass of the image tokenizer), stored by mode
    pipeline.py    Grain: shuffle, mix by mode, pack, batch; every iterator's state can be saved
"""
