"""Faults caused on purpose, under load, and what came of them: `python -m faults chaos | job | overload | fuzz | soak`.

A fault counts only if it was logged as done, while clients were sending and the service was up.
"""
