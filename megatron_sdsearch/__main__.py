"""``python -m megatron_sdsearch``."""

from megatron_sdsearch.cli import main

if __name__ == "__main__":  # the checkpoint writer spawns processes that import this file again
    main()
