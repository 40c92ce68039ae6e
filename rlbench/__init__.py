"""rlbench: a reinforcement-learning workbench for reasoning language models."""

__version__ = "0.1.0"
