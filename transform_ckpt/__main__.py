"""`python -m transform_ckpt`."""

from transform_ckpt.cli import main

if __name__ == "__main__":
    main()
