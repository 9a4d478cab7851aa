"""Noise schedules: how noise and image mix at a time t, what a network predicts there, and how sampling goes down.

`schedule.py` is the interface, and there is one file for each kind.
"""

from controlkit.bases.schedules.rectified_flow import RectifiedFlow
from controlkit.bases.schedules.schedule import TIME_SAMPLINGS, Schedule
from controlkit.bases.schedules.solvers import SOLVERS, Solver
from controlkit.bases.schedules.variance_preserving import VariancePreserving

__all__ = ["SOLVERS", "TIME_SAMPLINGS", "RectifiedFlow", "Schedule", "Solver", "VariancePreserving"]
