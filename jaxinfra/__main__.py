"""`python -m jaxinfra` is `jaxinfra`."""

from jaxinfra.cli import main

main()
