"""`python -m fwl_export` is `fwl-export`."""

from fwl_export.cli.main import main

if __name__ == "__main__":
    main()
