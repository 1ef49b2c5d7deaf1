"""Rewards of rollouts that any trainer made: from files, or as a small HTTP service.

    scoring.py     questions to the judge, components, totals and what is missing, for presets `paper` and `released`
    app.py         the HTTP service
    __main__.py    the command
"""
