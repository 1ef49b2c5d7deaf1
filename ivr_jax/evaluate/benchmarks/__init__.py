"""Public benchmarks of image generation and editing, each judged and summarised as its authors do.

    interface.py   what a benchmark is: items, layout of images, questions to a judge, figures
    suites/        one file a benchmark; the file's name is the benchmark's name on the command line
    datafiles.py   reading of published prompt files, with their hashes
    judgements.py  the record of judgements, one JSON object a line
    figures.py     figures with coverage, bootstrap intervals and paired comparisons
    run_folder.py  the folder of one run
    summary.py     `summary.json`; tables.py: Markdown and LaTeX; compare.py: two runs side by side

No data of a benchmark is part of this package: a user names the folder that holds it.
"""
