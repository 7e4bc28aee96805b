"""CAFE, coarse-to-fine sparse sequential recommendation: data, models, training, evaluation, recommendation."""
