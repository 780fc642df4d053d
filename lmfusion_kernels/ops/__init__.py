"""The ops, one file per op: public wrapper, shapes under tracing, autograd."""
