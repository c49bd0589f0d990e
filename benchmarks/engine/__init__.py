"""What the engine costs: client-rounds against the loops and the frameworks that people would use instead.

Start at `__main__`, which runs systems on workloads one after another, each in a process of its own, and writes one
line of JSON per run; `table` makes a table of lines. What is run stands in `workload`, by whom in `systems`, and how a
process tree is measured in `tree`. Nothing here but the systems themselves imports torch.
"""
