"""Judging students: features, distances with intervals, alignment, baselines, the report and the promotion gate."""
