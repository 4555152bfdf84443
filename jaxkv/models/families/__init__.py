"""Model families, a file each: how a checkpoint's fields and tensor names describe a `Decoder`."""
