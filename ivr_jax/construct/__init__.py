"""Data construction: the paper's escalation from requests to trajectories.

    interfaces.py   ANALYZER and GENERATOR, the two services
    services/       clients of real services: OpenAI protocol, gateway, checkpoint; prompts/ holds what they are asked
    crew.py         which analyzer and generator a config names
    escalation.py   direct -> reflections -> root cause -> atomic steps -> pruned trajectory
    thresholds.py   from scores to verdicts
    samples.py      a JSON list of samples
    inputs.py       what is to be constructed: such a list, or the micro-world's tasks
    baseline.py     first images by a checkpoint of our own
    ordered.py      many samples at once, results in order
    journal.py      what is known so far, on disk
    run.py          the escalation for many samples, resumable to the call
    assemble.py     from the journal to dataset, folders, gallery and summary
    released.py     the released folder layout, read and written
    exports.py      the three JSONL forms
"""
