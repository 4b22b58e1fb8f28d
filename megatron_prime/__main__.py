"""`python -m megatron_prime` is `megatron-prime`."""

from megatron_prime.commands.main import main_and_exit

if __name__ == "__main__":
    main_and_exit()
