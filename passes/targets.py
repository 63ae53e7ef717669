"""Targets by name, in words. Imports nothing, so that a command line can list them at once."""

from __future__ import annotations

TARGETS: dict[str, str] = {
    "onnxruntime": "ONNX Runtime on CPUs, with its fastest operators (1.29 and newer)",
    "onnx": "standard ONNX of opset 24, for any runtime that has it",
}
