"""Evaluation: distances between sets of pictures, bits per dimension, and whether a model copies its training data."""
