"""The training stages. Each is one file read top to bottom: config, batches, loss, entry; `loop.run` is their loop."""
