"""What everything stands on: errors, diagnostics, options, files, and being interrupted. No torch here."""
