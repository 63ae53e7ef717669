"""The target "tvm". Versions that would crash are refused before anything of TVM is imported."""

from transom.backends.tvm.versions import PAIR, require

require(*PAIR)
