"""What people read about a run; nothing here knows a model.

    answers.py          records of answers with their true evaluations, on disk
    metrics.py          figures of a set of answers; intervals.py: their 95% intervals
    tables.py           arms side by side
    gates.py            thresholds of a recipe; ranges.py: gates of several runs
    swaps.py            the result of a swap test
    gallery.py          answers round by round
    plots.py            curves and intervals
    collect.py          reads a work directory
    pages.py            the report's page; benchmark_page.py: that of a benchmark run
    live.py             a page that follows a run
"""
