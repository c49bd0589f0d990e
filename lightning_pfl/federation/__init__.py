"""Clients, rounds and places: the engine. Start at `strategy.FederatedStrategy`."""
