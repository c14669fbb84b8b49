"""`python -m jaxq` is `jaxq`."""

from jaxq.cli import main

if __name__ == "__main__":
    main()
