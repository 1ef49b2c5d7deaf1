"""Rewards.

    functions.py       pure array functions: outcome, format and step reward, complexity bonus, advantages
    judge.py           from answers to reward components, with an `Analyzer` as the judge
    judge_service.py   judging in the background: limits, deadlines, checks, cost
    released.py        rollout records in the authors' released form
"""
