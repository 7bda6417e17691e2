"""Tables and charts that a notebook shows."""
