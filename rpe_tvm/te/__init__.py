"""Tensor expressions of every operator: what is computed, in stages; how it is looped over is in `schedules/`."""
