"""Watching runs: their curves, what a log says of their health, two of them side by side."""
