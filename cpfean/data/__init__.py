"""Images as regions and captions as words: from files on disk to padded batches."""
