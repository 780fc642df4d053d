"""From samples to packed batches: order, mixture, documents, packing, loading."""
