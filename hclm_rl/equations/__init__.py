"""Equations as pure functions of tensors."""
