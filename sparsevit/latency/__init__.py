"""Latency of a sparse backbone on the device it runs on: measure, fit, predict."""

from sparsevit.latency.predictor import LatencyPredictor

__all__ = ["LatencyPredictor"]
