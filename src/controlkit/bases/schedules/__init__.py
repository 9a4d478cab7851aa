"""Noise schedules: how noise and image mix at time t, what the network predicts, and how sampling solves it.

`schedule.py` is the interface; each kind of schedule is one file.
"""

from controlkit.bases.schedules.rectified_flow import EvenlySpacedFlow, Flux2Flow, RectifiedFlow, SanaFlow
from controlkit.bases.schedules.schedule import TIME_SAMPLINGS, Schedule
from controlkit.bases.schedules.solvers import Solver
from controlkit.bases.schedules.variance_preserving import VariancePreserving
from controlkit.bases.solver_names import SOLVERS

__all__ = [
    "SOLVERS",
    "TIME_SAMPLINGS",
    "EvenlySpacedFlow",
    "Flux2Flow",
    "RectifiedFlow",
    "SanaFlow",
    "Schedule",
    "Solver",
    "VariancePreserving",
]
