"""Who does the work: each module is a program of its own, ``python -m benchmarks.engine.systems.X WORKLOAD MARKS``.

The peers' run in environments of their own, and therefore import nothing of this package but the workload, the model
and the marks.
"""
