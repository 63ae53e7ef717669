"""Verifies that a model keeps to the dialect: what TensorRT rejects, and what it would get wrong without a word.

Every rule stands for something that was seen when models were parsed and built; a new one is a function and a line in
a list. Only the model file is read, not its weights.
"""

from __future__ import annotations

from onnx import ModelProto

from transom.errors import DialectError
from transom.export.tensorrt.verify import attention_rules, cache_rules, quantization_rules, typing_rules
from transom.export.tensorrt.verify.view import Finding, Rule, View

RULES: tuple[Rule, ...] = (
    *typing_rules.RULES,
    *attention_rules.RULES,
    *cache_rules.RULES,
    *quantization_rules.RULES,
)


def verify(model: ModelProto) -> list[Finding]:
    """All that breaks a rule."""
    view = View(model)
    return [finding for rule in RULES for finding in rule.findings(view)]


def require(model: ModelProto) -> None:
    """Check a model.

    Raises:
        DialectError: Naming everything that breaks a rule.
    """
    if findings := verify(model):
        lines = "\n".join(f"  {finding}" for finding in findings)
        raise DialectError(f"TensorRT would not take this model, or would compute something else:\n{lines}")
