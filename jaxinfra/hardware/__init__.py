"""Chips on paper and as measured, rooflines over them, and what this machine can run.

`chips` the table, `detect` and `ceilings` this machine, `roofline` and `roofline_view` where the
operations of a model stand, `doctor` and `lessons` what runs here. Each is imported by itself.
"""
