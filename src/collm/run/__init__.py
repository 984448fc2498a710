"""A training run, from models, tools and rows to a calibrated collaboration."""

from collm.run.calibrate import PastRun, Validation
from collm.run.data import hold_out
from collm.run.options import DataConfig, RunConfig, parse_model, parse_tool
from collm.run.scores import Server, score, score_author, score_data
from collm.run.train import RunResult, leave, train_collaboration

__all__ = [
    "DataConfig",
    "PastRun",
    "RunConfig",
    "RunResult",
    "Server",
    "Validation",
    "hold_out",
    "leave",
    "parse_model",
    "parse_tool",
    "score",
    "score_author",
    "score_data",
    "train_collaboration",
]
