"""Boxes for our processes: what each may do, as data, and the order in which doors are shut."""
