"""Predicts peak memory and step time without a GPU, and what to switch on to fit one."""

from hybridlab.planner.plan import CardShare, Plan, plan
from hybridlab.planner.suggest import Situation, nearest_fit

__all__ = ["CardShare", "Plan", "Situation", "nearest_fit", "plan"]
