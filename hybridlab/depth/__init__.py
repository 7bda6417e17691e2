"""Predicted depth: how many blocks a step trains, and how the others get their weights."""

from hybridlab.depth.growth import RULES
from hybridlab.depth.schedule import DepthSchedule
from hybridlab.depth.stack import BlockStack

__all__ = ["RULES", "BlockStack", "DepthSchedule"]
