"""The micro-world: small scenes in which instruction, exact target and four-axis score are all computable.

An image is a board of cells, each empty or holding one object, framed by a ruler that tells columns a, b, c and rows
1, 2, 3 apart.  A request is a few edits in templated English; applying them in order to the source gives the one right
answer, so that data construction, training, rewards and evaluation run for real and end in numbers that can be wrong.

Worked example (level 0: 3x3 cells of 16 pixels, 64x64 pixels in all).  The source shows

        a             b             c
    1   red circle    .             .
    2   .             blue square   .
    3   .             .             green triangle

and the prompt is "Move a1 to b1. Paint the cell above b2 green. Swap b2 with c3."  The target is

        a             b               c
    1   .             green circle    .
    2   .             green triangle  .
    3   .             .               blue square

The cells a1, b1, b2, c3 are touched: errors there cost *instruction*; errors elsewhere cost *consistency*; b1 is
touched twice, so an error there also costs *knowledge*; a blot that is no object of the world costs *quality*.  An
answer that forgot the paint scores 3, 5, 5, 3 and is told

    failure analysis    Wrong target at b1.
    improvement plan    Make b1 green circle.

Its decomposition is one step an edit: "Move a1 to b1, nothing else.", "Paint the cell above b2 green, nothing else.",
"Swap b2 with c3, nothing else."

    levels.py       what each difficulty level contains
    scene.py        scenes and objects as values
    edits.py        kinds of edits, what they do and touch, and the taxonomy
    language.py     edits, verdicts, critiques and plans <-> English
    render.py       scenes -> pixels
    recognise.py    pixels -> scenes
    facts.py        what a sample carries so that it can be judged
    draws.py        random scenes and edits
    sampler.py      tasks, seeded and indexed
    splits.py       GenEval-like, KRIS-like and OmniContext-like splits
    judgement.py    comparing seen and wanted
    analyzer.py     the exact ANALYZER
    generator.py    the faulty GENERATOR
    practice.py     endless trajectories of scenes, to train a base model that understands
"""
