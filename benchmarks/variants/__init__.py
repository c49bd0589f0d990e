"""Which exchange pays: variants of the method, side by side on the same batches. Start at `__main__`."""
