"""The folder that `kvplug run` puts on PYTHONPATH, for its `sitecustomize`."""
