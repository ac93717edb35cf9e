"""Tuning: which algorithm and factorisation at which length, and MetaSchedule over the schedule of the best one."""
