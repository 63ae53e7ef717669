"""`python -m transom`, as `torchrun -m transom` needs it."""

from transom.cli import main

main()
