"""The lab's database server: connections, sessions, errors, what keeps them alive."""
