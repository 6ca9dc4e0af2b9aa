"""Stages for kvplug: a codec, two retention methods and a layout, each in a file."""
