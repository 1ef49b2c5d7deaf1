"""Checkpoints: stored, read, imported and exported.

    store.py            Orbax checkpoints with state, data iterator and metadata
    streaming.py        Orbax checkpoints a part at a time, for models larger than memory
    system.py           `load`: a model with its text and image tokenizer
    hf.py               Emu3.5's and transformers' tensor names, orders and shapes, in and out
    safetensors_io.py   safetensors files, a part of a tensor in memory at a time
    lazy.py             arrays that stay on disk until a part of them is asked for
    packed.py           a small model as three files, as the package carries one
    parity.py           logits of a checkpoint by this program and by transformers
"""
