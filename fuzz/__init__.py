"""Fuzzing of everything that reads another's bytes."""
