"""Learning rates of P and Q per number of samples and structure, chosen on validation by `tune` (seeds 100 and 101)."""

RATES = {
    16: {"local": 2e-2, "convex": 2e-2, "additive": 2e-2, "restart": 2e-2, "pull": 2e-2},
    64: {"local": 2e-2, "convex": 2e-2, "additive": 2e-2, "restart": 2e-2, "pull": 2e-2},
}
