"""Commands over the machines of a Ray cluster: parts of the work as tasks, one set of limits, one progress bar."""
