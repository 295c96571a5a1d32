"""Which rank holds which slice: layouts, strategy files, topologies.  Imports nothing, so that it costs nothing."""
