"""Data construction: the paper's escalation from requests to trajectories.

    escalation.py         direct -> reflections -> root cause -> atomic steps -> pruned trajectory
    samples.py            input: a JSON list of samples
    visual_reflection.py  input and output: visual_reflection_v1
    inputs.py             the input that a config names: one of these files, or tasks of the micro-world
    baseline.py           first images by a local model
    build_services.py     analyzer and generator that a config names
    run.py                the escalation for many samples: concurrent, in order, resumable to the call
    shards.py             parts of one construction, and merging them
    assemble.py           from the journal to dataset, folders, gallery and summary
    released.py           the released folder layout, read and written
    exports.py            the three released JSONL forms
"""
