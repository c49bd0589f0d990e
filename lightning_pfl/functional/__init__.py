"""Pure torch: tensors in, fresh tensors out. One file per idea."""
