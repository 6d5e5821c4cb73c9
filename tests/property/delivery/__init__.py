"""A state machine of the delivery: real parts, one action at a time, with processes that die at any time.

`world` has the real parts, `model` what must be true of them, `machine` the actions, `faults` the connections that die,
and `shrinking` makes a failing run shorter. `python -m tests.property.delivery` runs it for long.
"""
