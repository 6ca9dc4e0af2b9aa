"""The measurements, and the session that suites take them in."""
