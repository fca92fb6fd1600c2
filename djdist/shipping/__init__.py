"""What travels to workers: tables, classes, connections, arguments."""
