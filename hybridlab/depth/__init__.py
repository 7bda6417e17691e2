"""Predicted depth: how many blocks a step trains, and how the others get their weights."""

from hybridlab.depth.schedule import RULES, DepthSchedule
from hybridlab.depth.stack import BlockStack

__all__ = ["RULES", "BlockStack", "DepthSchedule"]
