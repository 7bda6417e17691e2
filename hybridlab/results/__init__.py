"""results.json: what a notebook found, its claims and their bounds."""
