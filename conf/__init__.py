"""Configuration groups, composed by Hydra."""
