"""What measures, draws and tabulates."""
