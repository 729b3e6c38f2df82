"""Stand-ins for values during a trace: what Python code may ask of them, and what a trace would lose."""
