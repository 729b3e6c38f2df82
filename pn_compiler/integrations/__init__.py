"""Optional modules, one for each library beside; none of them is imported by default."""
