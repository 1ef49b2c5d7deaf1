"""Data construction: the paper's escalation from requests to trajectories.

    interfaces.py   ANALYZER and GENERATOR, the two services
    escalation.py   direct -> reflections -> root cause -> atomic steps -> pruned trajectory
    thresholds.py   from scores to verdicts
    baseline.py     where the first image comes from
    released.py     the released folder layout, read and written
"""
