"""Values while a forward is traced: what Python may ask of them, and what would be lost."""
