"""What every part builds on: errors, checked settings, files, devices, compilers, checkpoints, page-locked memory."""
