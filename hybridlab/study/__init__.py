"""Studies: arms and seeds become runs, and runs become comparisons."""
