"""What result files say, as tables, a picture, a page and files for other programs."""
