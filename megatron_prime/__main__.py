"""`python -m megatron_prime` is `megatron-prime`."""

import sys

from megatron_prime.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
