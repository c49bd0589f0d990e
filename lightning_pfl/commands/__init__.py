"""The work behind the commands of ``lightning-pfl``; `lightning_pfl.cli` puts them together."""
