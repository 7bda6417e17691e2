"""Runs notebooks as batch jobs: parameter files are checked, papermill executes, exit codes are real."""
