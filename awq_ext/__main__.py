"""``python -m awq_ext``: the same as ``awq-ext``."""

from .cli import main

if __name__ == "__main__":
    main()
