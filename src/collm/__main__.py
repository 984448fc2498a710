"""`python -m collm`, and what torchrun and `accelerate launch -m collm` start."""

from collm.cli.main import main

main()
