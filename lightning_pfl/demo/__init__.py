"""The main job, end to end, for a person at a terminal. Start at `run.run_demo`."""
