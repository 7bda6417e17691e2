"""Predicts peak memory and step time without a GPU, and what to switch on to fit one."""

from hybridlab.planner.plan import Plan, plan, plan_training
from hybridlab.planner.spec import GpuOverhead, TrainingSpec
from hybridlab.planner.suggest import nearest_fit
