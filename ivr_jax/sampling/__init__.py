"""From requests to answers.

    requests.py            what a user asks for, checked and made ready
    rollout.py             `roll_out`: encode prompts, sample, parse, decode the images
    batch.py               the loop that keeps the engine's slots full
    engine.py              the engine: answers in progress in a fixed number of slots
    slots.py               its arrays, and the programs that fill and move them
    decode_loop.py         the jitted loop of model calls
    token_choice.py        from hidden states to tokens, chosen by the model or forced by the grammar
    logits_processors.py   the sampled distribution: grammar mask, guidance, temperature, top-k, top-p
    speculation.py         several image tokens a model call, the same tokens as without
    drafts.py              stored first images that several continuations start from
    layout.py              the layout of weights for sampling
"""
