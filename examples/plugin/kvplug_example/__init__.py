"""Two stages for kvplug: the codec `int8_token` and the retention method `keynorm`."""
