"""What attention reads of a layer, and how."""
