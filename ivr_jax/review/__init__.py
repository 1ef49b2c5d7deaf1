"""Human review: two people judge every sample of a dataset, and only unanimous accepts stay.

    decisions.py    what they decided, in SQLite: durable, undoable, one standing verdict a sample and reviewer
    agreement.py    counts and Cohen's kappa
    reviewed.py     the dataset of unanimous accepts
    app.py          the local web application; page/ holds its HTML, style and script
"""
