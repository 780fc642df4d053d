"""Files on local disks and remote stores, and ranges of their bytes."""
