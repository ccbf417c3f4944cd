"""What is peculiar to /v1/responses: a conversation made of items, and an answer told by typed events."""
