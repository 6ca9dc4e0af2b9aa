"""What is written down: tasks, rows, their files, and rows as tables of text."""
