"""Tool calling: from the tools of a request to the prompt, to the grammar and back from the text of the answer."""
