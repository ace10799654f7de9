"""The engine: continuous and depth-wise batching of requests over one model."""

from effinfer.engine.calibrate import Calibration, calibrate
from effinfer.engine.engine import Engine, EngineClosed, QueueFull
from effinfer.engine.generate import generate
from effinfer.engine.handle import Handle, Output, Timings
from effinfer.engine.params import SamplingParams
from effinfer.engine.sampling import TokenLogprobs
from effinfer.engine.submission import RequestTooLong

__all__ = [
    "Calibration",
    "Engine",
    "EngineClosed",
    "Handle",
    "Output",
    "QueueFull",
    "RequestTooLong",
    "SamplingParams",
    "Timings",
    "TokenLogprobs",
    "calibrate",
    "generate",
]
