"""Readers of model files, shared by the loader and the planner."""
