"""`python -m alignkit` is `alignkit`."""

from alignkit.cli.main import main

if __name__ == "__main__":
    main()
