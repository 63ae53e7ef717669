"""Imported before anything of TVM: refuses versions that would crash."""

from __future__ import annotations

from transom.backends.tvm.compat import PAIR, require

require(*PAIR)
