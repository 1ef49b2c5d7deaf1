"""The token language: how a trajectory is written as tokens, and which token sequences are trajectories.

    vocabulary.py       which id means what (the Emu3.5 table, and the micro table built the same way)
    text.py             text <-> ids: the interface, and the micro-world's phrases
    emu_text.py         text <-> ids with Emu3.5's byte-pair tokenizer
    markers.py          the fixed strings of an answer
    grammar.py          one table-driven automaton: constrained decoding, the format reward and the parser all use it
    joined_grammar.py   several grammars as one automaton, for batches of several modes
    codec.py            sample -> prompt tokens, trajectory <-> answer tokens, segments and the selective loss mask
    interleaved.py      answers that are no trajectory: texts and images in any order

An answer stands between `<|extra_100|>` (BSS) and EOS:

    answer   = draw evaluate ( reflect draw evaluate )*  |  draw evaluate ( step draw evaluate )+
    draw     = BOI h "*" w IMG  row EOL row ... row  EOI
    evaluate = "<Evaluate>" four axes, each "pass: reason" or "fail: reason" "</Evaluate>"
    reflect  = "<Failure Analysis>" text "</Failure Analysis>" "<Improvement Plan>" text "</Improvement Plan>"
    step     = "<Step k>" text "</Step k>"                                        k = 2, 3, ...
"""
