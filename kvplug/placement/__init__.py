"""Where encoded blocks are kept: one idea per file, all behind `base.Placement`."""
