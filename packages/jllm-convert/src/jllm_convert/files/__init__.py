"""Files on this machine: regular files, untrusted model folders, free space."""
