"""The trainer: its settings, its phases, and what decides about a jump."""
