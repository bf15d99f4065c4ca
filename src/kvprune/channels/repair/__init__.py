"""Closed-form repair of a cut: no gradients, one pass over the calibration text."""

REPAIRS = ("rotate+refit", "rotate", "refit", "none")
