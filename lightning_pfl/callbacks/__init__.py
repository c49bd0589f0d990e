"""What happens inside one client's Trainer. Start at `callbacks/colora.py`."""
