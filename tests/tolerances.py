"""Every numeric tolerance of the tests, and why it is what it is."""

FP32_LOGITS = 1e-4
"""Largest difference of float32 logits between two eager implementations that sum the same products in another order.
Logits of gemma3-tiny reach 11, where a float32 step is 1e-6; measured 1e-5 over six layers."""

FP32_LOGITS_270M = 4e-4
"""The same for the real 270M, whose logits reach 33 over eighteen layers; measured 4e-5 over 965 positions."""
