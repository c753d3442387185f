"""The terms under verl 0.9: `plugin` registers, `trainer` runs stage 1, `loss` stage 2, `policy_loss` is the light way.

Importing this package imports nothing of verl.
"""
