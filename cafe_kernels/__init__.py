"""Ops and modules of CAFE that know nothing of recommender data."""
