"""Public benchmarks of image generation and editing, each judged and summarised as its authors do.

    interface.py    what a benchmark is: items, layout of images, questions to a judge, figures
    suites/         one file a benchmark; the file's name is the benchmark's name on the command line
    registry.py     the benchmarks by name
    datafiles.py    reading of published prompt files, with their hashes

    command.py      the command: generate, judge, summarise; comparison.py: two finished runs (`--compare`)
    session.py      one run, from flags to files; costs.py: what it will cost
    run_folder.py   the folder of one run
    generation.py   answers of a model to the prompts
    prompts.py      the questions' texts
    judges.py       the judges: a service, a detector (detection.py), the micro-world's analyzer
    judging.py      puts the questions to a judge; judgements.py: the record of judgements
    sanity.py       images on which a judge must be right

    figures.py      figures with coverage, bootstrap intervals and paired comparisons
    summary.py      `summary.json`; compare.py: paired differences of two runs
    outputs.py      what a judged run leaves behind; tables.py: Markdown and LaTeX; gallery.py: wins and losses
    held_out.py     a benchmark as a metric of training

No data of a benchmark is part of this package: a user names the folder that holds it.
"""
