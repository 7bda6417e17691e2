"""Memory features: what lets a model train in less memory, and what it costs."""
