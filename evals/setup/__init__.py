"""What is asked for, and what it is measured on: config, contenders, model, text, machine."""
