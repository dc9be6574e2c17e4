"""Tests of embellama_server; ``python -m tests`` runs everything."""
