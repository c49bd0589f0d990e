"""Tasks, images and models of the benchmark: everything but federation.

Start at `tasks` (what a task is), `vlm` (the model that answers) and `packages` (where images and weights come from).
"""
