"""What only a GPU can show, and in small part the CPU, so that every body is known to run."""
