"""sftcore: find out what a base model remembers, then fine-tune it on exactly the data that pays."""
