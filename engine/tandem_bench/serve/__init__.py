"""Load and questions for any OpenAI endpoint."""
