"""The ops, one file each: public wrapper, shapes under tracing, autograd."""
