"""Answers and their report, the comparison of methods, forgetting."""
