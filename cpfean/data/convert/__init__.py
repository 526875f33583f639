"""Released features and captions, turned into the native format of docs/data.md."""
