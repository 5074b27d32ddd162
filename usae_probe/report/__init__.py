"""What people see: terminal summaries and figures. The only importers of rich and matplotlib."""
