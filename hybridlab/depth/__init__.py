"""Predicted depth: how many blocks a step trains, and how the others get their weights."""

from hybridlab.depth.schedule import BEST, RULES, DepthSchedule
from hybridlab.depth.stack import BlockStack
