"""The live panel: controls, gauges, timeline and the final frame."""
