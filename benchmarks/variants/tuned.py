"""Learning rates of P and Q per number of samples and structure, chosen on validation by `tune` (seed 100).

The rate with the highest Self among those whose likelihood is within 0.15 nats of the structure's best: accuracy alone
would choose rates at which answers are confidently wrong. "accuracy" is what it would choose for training alone.
"""

RATES = {
    16: {"local": 2e-2, "convex": 2e-2, "additive": 5e-3, "restart": 0.32, "pull": 4e-2, "accuracy": 4e-2},
    64: {"local": 8e-2, "convex": 8e-2, "additive": 4e-2, "restart": 0.32, "pull": 0.16, "accuracy": 0.16},
}
