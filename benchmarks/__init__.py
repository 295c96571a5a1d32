"""Speed and memory beside `cp` and MindSpore: `make bench`."""
