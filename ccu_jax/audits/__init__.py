"""Audits of unlearning: pure functions of stored outputs, with intervals and controls.

`intervals`, `auc` the statistics; `attacks` what one model tells of its rows; `scores`,
`distances` how far it is from a reference; `shadow`, `forgetting` what pools of models
tell; `epsilon` lower bounds of what leaks; `verdict` all that in words. What cannot be
measured (no rows, too few of them, values that are no numbers) is None.
"""
