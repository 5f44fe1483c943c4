"""What a data file is made of: bytes in, records out. One file a container; nothing else reads data files."""
