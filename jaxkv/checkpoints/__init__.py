"""Readers of a model's files, which its loader and the planner share."""
