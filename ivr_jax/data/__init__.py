"""Stored trajectories -> token examples -> packed batches.

    store.py         the dataset of trajectories on disk, images stored once
    card.py          what a dataset holds, counted: README.md and card.json beside it
    sources.py       where trajectories are read from: our folders, or TFDS tables
    tfds_builder.py  the same dataset as TensorFlow Datasets tables
    examples.py      trajectories -> token examples (one pass of the image tokenizer), stored by mode
    online.py        token examples without a dataset: lessons of the micro-world
    pipeline.py      Grain: shuffle, mix by mode, pack, batch; every iterator's state can be saved
"""
