"""Stages for kvplug: two codecs, two retention methods and a layout, each in a file."""
