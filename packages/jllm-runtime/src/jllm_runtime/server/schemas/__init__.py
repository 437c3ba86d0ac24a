"""What goes over the wire, in the names of the OpenAI API."""
