"""Recurrences over the tokens of a step: ``reference`` in plain torch, ``cpu`` in C++."""
