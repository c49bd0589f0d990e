"""The offline suite: forty tasks over ten clients and four times, and some that no client ever trains on.

Start at `catalogue.TASKS` (what there is) and `recipes.build_task` (the examples of one task). `library` says which
pictures a task may show on which side of its split, `graph` which tasks are related and why, `build` writes the
published format, `verify` checks what was promised.
"""
