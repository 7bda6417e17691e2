"""The trainable weights, their path, snapshots, and the only code that moves them."""
