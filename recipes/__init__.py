"""Recipes: one configuration per documented result."""
