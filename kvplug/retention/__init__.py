"""Which tokens stay: one idea per file, all behind `base.Retention`."""
