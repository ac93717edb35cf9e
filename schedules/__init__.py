"""Schedules per target: design spaces for MetaSchedule, and the same with fixed decisions as defaults."""
