"""Pydantic schemas of requests and responses, in the names of the OpenAI API."""
