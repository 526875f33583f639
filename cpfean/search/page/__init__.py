"""The search page: what it says, Gradio around it, and the server that it runs on."""
