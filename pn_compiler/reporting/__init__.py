"""What a run of the command found, as files: JSON for machines, a page for people."""
