"""Methods compared on the same clients, models, data and steps, over seeds: from a YAML file to a report.

Start at `plan.Comparison`, which is what the YAML file says, and at `commands`, which are what a person calls. A
comparison is a grid of runs, one per method and seed. `preparation` makes what all runs share, once; `training` does
one run; `sweep` does all that are not finished; `report` reads what they wrote.
"""
