"""HTTP server: the OpenAI API over an engine, and a web page to chat."""
