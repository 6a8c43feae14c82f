"""The web in miniature: what is asked, the documents about it, and the tokenizer that reads
both."""
