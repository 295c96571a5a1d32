"""The version, where setup.py and manifests read it."""

VERSION = "0.1.0"
