"""`python -m cxrbatch` is `cxrbatch`."""

if __name__ == "__main__":
    from cxrbatch.cli import main  # here: a decode process imports this file too, and needs no command line

    main()
