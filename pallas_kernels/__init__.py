"""Kernels: they know arrays and nothing of models."""
