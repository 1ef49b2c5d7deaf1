"""Models in Flax NNX; parameters are plain nested dictionaries.

    layers.py             parts of the decoder; the legend of axis letters
    backbone.py           the decoder: parameters with their logical axes, forward pass
    backbone_config.py    its sizes and options; transformers' config.json
    kv_cache.py           its keys and values so far: layout, writing, reading, int8
    fused_attention.py    attention of the training pass on TPU (splash) and GPU (cuDNN)
    decode_attention.py   attention over the KV cache on TPU (Pallas)
    accumulate_scan.py    a scan over layers whose backward pass adds to sums of gradients
    int8.py               weights and KV cache of inference as int8
    lora.py               low-rank adapters
    image_tokenizer.py    the image tokenizer (IBQ): encoder, codebook, decoder
    image_layers.py       its layers
    image_codec.py        pixels <-> codes for images of any sizes, with a cache
"""
