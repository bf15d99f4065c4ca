"""Offline: what a calibration text says (evidence) -> how much each layer keeps (widths) -> which coordinates (choice)
-> the plan -> the cut -> repair. prune.py walks through the rooms in that order; planning.py makes the plan.
"""
