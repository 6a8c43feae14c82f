"""The web in miniature: arithmetic problems, the documents written about them, and the tokenizer that reads both."""
