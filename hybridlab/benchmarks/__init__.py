"""Measurements that are no training runs: time of a step, of a jump, and the memory of an arm."""
